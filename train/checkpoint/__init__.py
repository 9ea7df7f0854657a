"""Sharded checkpoints: written whole or not at all, proven when read, at any layout."""
