"""Evaluation tasks: from the user's files, generated from a seed, or from packages that contain data."""
