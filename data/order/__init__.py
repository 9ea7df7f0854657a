"""Which row comes at which position: a pure function."""
