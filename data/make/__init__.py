"""Preparing: parts of sources to shards, by several processes, restartable."""
