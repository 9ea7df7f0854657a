"""Kubernetes: the manifest of a run, and the command that submits it."""
