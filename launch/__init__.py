"""Planning, starting and watching runs. No torch: `train` is started as a process."""
