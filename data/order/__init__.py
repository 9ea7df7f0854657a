"""The row at each position: a pure function."""
