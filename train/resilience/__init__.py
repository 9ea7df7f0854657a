"""Signals, non-finite values, and time that runs out."""
