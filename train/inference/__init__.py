"""Generating text from a checkpoint."""
