"""Prepared data on disk: shards, manifest, origins, checksums, local copies."""
