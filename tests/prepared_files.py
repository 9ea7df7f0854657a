"""Reads the files of a folder of prepared data, for tests that compare them with the texts they were made from."""

from pathlib import Path

import numpy as np

from data.store.manifest import Manifest, ShardEntry, file_sha256
from data.store.shards import open_shard


def documents_of(folder: Path, entry: ShardEntry) -> list[np.ndarray]:
    """Token ids of each document of a manifest's entry, with its begin- and end-of-document tokens."""
    shard = open_shard(entry.prefix(folder))
    documents = np.split(np.asarray(shard.tokens), shard.ends[:-1])
    chosen = documents[entry.first_document : entry.first_document + entry.documents]
    assert len(chosen) == entry.documents and sum(map(len, chosen)) == entry.tokens
    assert shard.tokens.dtype == np.dtype(entry.dtype)
    return chosen


def check_digests(folder: Path, manifest: Manifest) -> None:
    """Compare every file of a folder with the manifest's checksum."""
    assert file_sha256(folder / manifest.tokenizer.file) == manifest.tokenizer.sha256
    for source in manifest.sources.values():
        for entry in (entry for entries in source.splits.values() for entry in entries):
            for suffix, facts in entry.files.items():
                assert file_sha256(entry.file(folder, suffix)) == facts.sha256, f"{entry.path}.{suffix}"
