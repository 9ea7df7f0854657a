"""Runs on this machine: start, watch, end and restart the processes."""
