"""Stop signals, non-finite values, hangs, and the lease of the run folder."""
