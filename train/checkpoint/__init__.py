"""Sharded checkpoints: published only when complete, verified when read, readable at any layout."""
