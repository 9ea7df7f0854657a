"""Processes of a run on this machine: start, watch, end, restart."""
