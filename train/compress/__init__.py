"""Scoring, pruning and searching shapes."""
