"""Evaluation tasks: from files of one's own, made from a seed, or out of packages that ship data."""
