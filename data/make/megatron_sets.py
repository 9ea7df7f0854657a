"""Existing Megatron `.bin/.idx` sets as a source. They are read in place, never copied, and checked once.

The first documents of each set are held out, so that they stay held out when documents are appended later. (Megatron-LM
holds out the last ones. Once the set has grown, its training reads them.) Checksums, the largest id and bytes of text are
found in one pass over the tokens.
"""

import glob
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data.sources.files import is_remote
from data.sources.records import Part
from data.store.manifest import FileFacts, ShardEntry, file_facts
from data.store.shards import Shard, open_shard
from data.tokenizer import Tokenizer
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError

_TOKENS = 1 << 24
"""Tokens read at a time."""


def find_sets(place: str, source: SourceConfig) -> list[Part]:
    """The sets that a path stands for: a path without suffix, a folder, or a glob. Raises DataError if it matches no set."""
    if is_remote(source.path):
        raise DataError(f"{place}.path={source.path}: Megatron sets are read in place, so they must be local files.")
    pattern = source.path.removesuffix(".bin").removesuffix(".idx")
    if Path(pattern).is_dir():
        found = sorted(Path(pattern).rglob("*.idx"))
    else:
        found = [Path(f) for f in sorted(glob.glob(f"{pattern}.idx", recursive=True))]
    if not found:
        raise DataError(
            f"{place}.path={source.path}: no Megatron set there (no {pattern}.idx). Give the path without suffix."
        )
    prefixes = [str(path.resolve().with_suffix("")) for path in found]
    sizes = [Path(f"{prefix}.bin").stat().st_size if Path(f"{prefix}.bin").is_file() else 0 for prefix in prefixes]
    return [Part(p, "megatron", size=size, file_size=size) for p, size in zip(prefixes, sizes, strict=True)]


def unended_documents(prefix: str, eod: int) -> int:
    """Documents of a set that do not end with the end-of-document token (made without Megatron-LM's --append-eod)."""
    shard = open_shard(Path(prefix))
    lasts = shard.ends[np.diff(shard.ends, prepend=0) > 0] - 1
    unended = len(shard.ends) - len(lasts)
    for place, block in _blocks(shard, 0, len(shard.tokens)):
        here = lasts[np.searchsorted(lasts, place) : np.searchsorted(lasts, place + len(block))]
        unended += int((block[here - place] != eod).sum())
    return unended


def describe_set(
    prefix: str, tokenizer: Tokenizer, *, fraction: float, is_first: bool, report: Callable[[int, int, int], None]
) -> dict[str, ShardEntry]:
    """Entries of a set's splits, by split; a split without documents is left out.

    is_first: the source's first set, which holds out at least one document. report: called with bytes, bytes of text and
    tokens read since the call before. DataError for a damaged set, and for ids beyond the tokenizer's vocabulary.
    """
    shard = open_shard(Path(prefix))
    count = len(shard.ends)
    heldout_count = max(int(is_first), round(count * fraction))
    if count < heldout_count + int(is_first and fraction < 1):
        raise DataError(
            f"{prefix}.idx has {count} documents: too few to hold some out. Give a set with more documents."
        )
    sha256 = hashlib.sha256()
    text_bytes = {}
    middle = int(shard.ends[heldout_count - 1]) if heldout_count else 0
    token_bytes = tokenizer.token_bytes()
    for split, start, stop in (("heldout", 0, middle), ("train", middle, len(shard.tokens))):
        text_bytes[split] = _scan(shard, start, stop, sha256, token_bytes, report)
    files = {
        "bin": FileFacts(bytes=len(shard.tokens) * shard.tokens.dtype.itemsize, sha256=sha256.hexdigest()),
        "idx": file_facts(Path(f"{prefix}.idx")),
    }
    tokens = {"train": len(shard.tokens) - middle, "heldout": middle}
    documents = {"train": count - heldout_count, "heldout": heldout_count}
    return {
        split: ShardEntry(
            path=prefix,
            documents=documents[split],
            tokens=tokens[split],
            text_bytes=text_bytes[split],
            dtype=shard.tokens.dtype.name,
            files=files,
            first_document=heldout_count if split == "train" else 0,
        )
        for split in documents
        if documents[split]
    }


def _scan(
    shard: Shard,
    start: int,
    stop: int,
    sha256: "hashlib._Hash",
    token_bytes: np.ndarray,
    report: Callable[[int, int, int], None],
) -> int:
    """Bytes of text of tokens start to stop. Adds the tokens to the checksum. DataError for ids beyond the vocabulary."""
    text_bytes = 0
    for _, block in _blocks(shard, start, stop):
        sha256.update(block.tobytes())
        least, most = int(block.min()), int(block.max())
        if least < 0 or most >= len(token_bytes):
            raise DataError(
                f"{shard.prefix}.bin contains token id {most if least >= 0 else least:,}, outside the tokenizer's vocabulary "
                f"of {len(token_bytes):,}. Set data.tokenizer.path to the tokenizer this set was made with."
            )
        size = int(token_bytes[block].sum(dtype=np.int64))
        text_bytes += size
        report(block.nbytes, size, block.size)
    return text_bytes


def _blocks(shard: Shard, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index of its first token, block) for tokens start to stop.

    They are read, not mapped: if the set is cut short meanwhile, a read fails with a message, where a map kills the process.
    """
    path, dtype = Path(f"{shard.prefix}.bin"), shard.tokens.dtype
    with path.open("rb") as stream:
        stream.seek(start * dtype.itemsize)
        for place in range(start, stop, _TOKENS):
            block = np.fromfile(stream, dtype=dtype, count=min(_TOKENS, stop - place))
            if len(block) < min(_TOKENS, stop - place):
                raise DataError(
                    f"{path} ends after {place + len(block):,} tokens: it was cut short while it was read. Make the set again."
                )
            yield place, block
