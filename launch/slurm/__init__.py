"""Slurm: write job scripts, submit them, continue runs over several jobs."""
