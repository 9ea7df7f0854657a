"""Learning from a teacher: its placement, its answers on disk, the losses."""
