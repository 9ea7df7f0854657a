"""Which row is at each position of the global order, as a pure function of the position."""
