"""Prepared data made by hand, token by token, for tests and benchmarks that must know every id."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.store.manifest import Manifest, ShardEntry, SourceEntry, TokenizerEntry, file_sha256, write_manifest
from data.store.shards import ShardWriter
from data.tokenizer import Tokenizer, train_tokenizer
from recipes.schema.data import TokenizerConfig

TEXT = "the quick brown fox jumps over the lazy dog and runs away from all those documents\n" * 30


def write_folder(
    folder: Path, sources: dict[str, Sequence[Sequence[np.ndarray]]], *, vocab: int = 300, heldout: int = 400
) -> Manifest:
    """A folder of data. sources: by name, documents of each shard, each ending with the end-of-document id (0).

    Held-out documents are random. -> the manifest, which is also written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([TEXT], TokenizerConfig(vocab_size=min(vocab, 300)))
    rng = np.random.default_rng(5)
    entries = {}
    for name, shards in sources.items():
        held = [np.append(rng.integers(1, min(vocab, 300), heldout), 0)]
        train = [write_shard(folder, f"{name}.train-{i:05d}", documents) for i, documents in enumerate(shards)]
        entries[name] = SourceEntry(
            description={"path": "made by hand"},
            splits={"train": train, "heldout": [write_shard(folder, f"{name}.heldout-00000", held)]},
        )
    manifest = Manifest(
        tokenizer=tokenizer_entry(folder, tokenizer),
        request={},
        sources=entries,
    )
    write_manifest(folder, manifest)
    return manifest


def tokenizer_entry(folder: Path, tokenizer: Tokenizer) -> TokenizerEntry:
    """Write a tokenizer into a folder of data. -> its entry for the manifest."""
    tokenizer.save(folder / "tokenizer.json")
    return TokenizerEntry(
        file="tokenizer.json",
        sha256=file_sha256(folder / "tokenizer.json"),
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
    )


def write_shard(folder: Path, name: str, documents: Sequence[np.ndarray]) -> ShardEntry:
    """One shard and its manifest entry."""
    with ShardWriter(folder / name, vocab_size=300) as writer:
        for document in documents:
            writer.add(document)
        facts = writer.finish()
    return ShardEntry(
        path=name,
        documents=len(documents),
        tokens=writer.tokens,
        text_bytes=writer.tokens,
        dtype=writer.dtype.name,
        files=facts,
    )


def random_documents(count: int, *, seed: int, longest: int = 40) -> list[np.ndarray]:
    """Documents of random lengths and ids below 300, each ending with id 0."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(1, 300, rng.integers(1, longest)), 0) for _ in range(count)]
