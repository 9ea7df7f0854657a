"""Rows of tokens out of shards: reading, packing, fill-in-the-middle."""
