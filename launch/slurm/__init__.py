"""Slurm: job scripts, submission, continuation."""
