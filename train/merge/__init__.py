"""Weighted sums of models: of two, or of the checkpoints of one run, as a new run."""
