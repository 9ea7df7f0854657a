"""Held-out bits per byte."""
