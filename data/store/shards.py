"""Token shards on disk, in Megatron-LM's indexed format.

    NAME.bin    token ids of all documents, one after the other, in any of Megatron's integer types
    NAME.idx    "MMIDIDX\\0\\0", version 1, dtype code, counts; then lengths int32, byte offsets int64, document ends int64

    NAME.mask.bin, NAME.mask.idx    of chats and preferences: 1 for each token that is learned, else 0; the same documents, uint8
    NAME.ranks.bin, NAME.ranks.idx  of preferences: rank, and 1 or 0 whether a group begins, for each document, int16
    NAME.items.bin, NAME.items.idx, NAME.media.bin, NAME.media.idx    of media: see `data.media.items`

Megatron-LM reads these files and this project reads Megatron-LM's, unchanged. A file is written under a temporary name,
synced to disk, then renamed.
"""

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.store.manifest import FileFacts
from data.system import disk
from data.system.closing import Closing
from recipes.schema.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"), 5: np.dtype("<i8"), 8: np.dtype("<u2")
}  # fmt: skip
"""Megatron's dtype codes of token ids (6 and 7 are floating point)."""
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type in which ids of a vocabulary are stored: uint16 below 65,500 as in Megatron, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class ShardWriter(Closing):
    """Writes one shard, document by document. The files get their names in `finish`.

    Use it as a context manager: if it ends without `finish`, the temporary file is removed. Two writers of the same shard (one
    of a run that was believed dead) do not disturb each other, because each has a temporary name of its own.
    """

    def __init__(self, prefix: Path, *, vocab_size: int, dtype: str | None = None) -> None:
        """dtype: how ids are stored; None: as Megatron stores those of such a vocabulary."""
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size) if dtype is None else np.dtype(dtype)
        self.vocab_size = vocab_size
        self.lengths = array("i")
        self.tokens = 0
        self._aside = disk.aside_of(Path(f"{prefix}.bin"), is_own=True)
        self._stream = self._aside.open("wb")
        self._sha256 = hashlib.sha256()

    def add_bytes(self, content: bytes) -> None:
        """Append one document of bytes, of a writer of uint8."""
        assert self.dtype == np.uint8, "a set of bytes"
        self._append(content, len(content))

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document with its end-of-document token. DataError for an id outside the vocabulary."""
        numbers = np.asarray(ids, dtype=np.int64)
        if numbers.size == 0 or numbers.min() < 0 or numbers.max() >= self.vocab_size:
            raise DataError(
                f"{self.prefix}: a document is empty or has ids outside the vocabulary of {self.vocab_size:,}. Set "
                f"data.tokenizer to a tokenizer whose ids are below its vocabulary size."
            )
        self._append(numbers.astype(self.dtype).tobytes(), numbers.size)

    def _append(self, content: bytes, tokens: int) -> None:
        self._stream.write(content)
        self._sha256.update(content)
        self.lengths.append(tokens)
        self.tokens += tokens

    def finish(self) -> dict[str, FileFacts]:
        """Sync the files and give them their names, the token file first and the index last. -> facts by suffix."""
        self._stream.close()
        count = len(self.lengths)
        lengths = np.asarray(self.lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype=np.int64)
        offsets = np.concatenate([[0], ends[:-1]]).astype("<i8") * self.dtype.itemsize if count else ends.astype("<i8")
        header = _HEADER.pack(_MAGIC, 1, _CODES[self.dtype], count, count + 1)
        index = header + lengths.tobytes() + offsets.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()
        size = self._aside.stat().st_size
        disk.put_in_place(self._aside, Path(f"{self.prefix}.bin"))
        return {
            "bin": FileFacts(bytes=size, sha256=self._sha256.hexdigest()),
            "idx": write_with_facts(Path(f"{self.prefix}.idx"), index),
        }

    def close(self) -> None:
        """Close the file, and remove it if it was not finished."""
        self._stream.close()
        self._aside.unlink(missing_ok=True)


def write_with_facts(path: Path, content: bytes) -> FileFacts:
    """Write a file atomically. -> its facts."""
    disk.write_bytes(path, content, is_own=True)
    return FileFacts(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Header:
    """The header of an index."""

    dtype: np.dtype[Any]
    sequences: int
    documents: int
    """Entries of the document index: documents + 1."""

    @property
    def offsets_at(self) -> int:
        """Byte of the index file at which the sequences' offsets begin."""
        return _HEADER.size + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        """Byte of the index file at which the document index begins."""
        return _HEADER.size + 12 * self.sequences


def read_header(index: Path) -> Header:
    """The header of an index file. DataError if it is damaged or the file has the wrong length."""
    with index.open("rb") as stream:
        raw = stream.read(_HEADER.size)
        size = os.fstat(stream.fileno()).st_size
    return _header(index, raw, size)


def _header(index: Path, raw: bytes, size: int) -> Header:
    if len(raw) < _HEADER.size:
        raise DataError(f"{index} is {size} bytes long: too short for a shard index. Prepare the data again.")
    magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != 1:
        raise DataError(f"{index} is not a Megatron index of version 1. Prepare the data again.")
    if code not in _DTYPES:
        raise DataError(
            f"{index} stores tokens as dtype code {code}, but token ids are integers: codes 1-5 and 8. Make it "
            f"again from token ids."
        )
    expected = _HEADER.size + sequences * 12 + documents * 8
    if size == expected + sequences and sequences:
        raise DataError(
            f"{index} is the index of a multimodal set (it ends with a mode for each sequence), which is not supported. Make "
            f"the set from text alone."
        )
    if size != expected:
        raise DataError(
            f"{index} is {size:,} bytes long instead of {expected:,}: it is damaged. Prepare the data again."
        )
    return Header(_DTYPES[code], sequences, documents)


@dataclass(frozen=True)
class Shard:
    """One shard, memory-mapped. Document d ends before `tokens[ends[d]]`."""

    prefix: Path
    tokens: np.ndarray
    ends: np.ndarray


def open_shard(prefix: Path) -> Shard:
    """Map a shard and check that index and token file match. DataError names the file that is wrong."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise DataError(f"{path} is missing. Prepare the data again: stratum prepare -cn <recipe>.")
    raw = index.read_bytes()
    header = _header(index, raw, len(raw))
    dtype, count, documents = header.dtype, header.sequences, header.documents
    lengths = np.frombuffer(raw, dtype="<i4", count=count, offset=_HEADER.size)
    # Megatron may split a document into several sequences. The document index gives the sequence at which each ends.
    boundaries = np.frombuffer(raw, dtype="<i8", count=documents, offset=_HEADER.size + count * 12)
    places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    offsets = np.frombuffer(raw, dtype="<i8", count=count, offset=_HEADER.size + count * 4)
    wrong = _what_is_wrong(lengths, offsets, boundaries, places[:-1] * dtype.itemsize)
    if wrong is not None:
        raise DataError(
            f"{index} {wrong}: it is damaged, or its sequences do not follow each other without gaps. Make it again."
        )
    ends = places[boundaries[1:]]
    size = tokens.stat().st_size
    total = int(ends[-1]) if len(ends) else 0
    if size != total * dtype.itemsize:
        raise DataError(
            f"{tokens} is {size:,} bytes long, but its index says {total * dtype.itemsize:,}: truncated or replaced. "
            f"Prepare the data again."
        )
    array = np.memmap(tokens, dtype=dtype, mode="r") if total else np.empty(0, dtype=dtype)
    return Shard(prefix=prefix, tokens=array, ends=ends)


def _what_is_wrong(
    lengths: np.ndarray, offsets: np.ndarray, boundaries: np.ndarray, expected: np.ndarray
) -> str | None:
    """Why an index is invalid, for a message; None if it is valid. expected: byte offsets of sequences without gaps."""
    if (lengths < 0).any():
        return f"has a sequence of {lengths.min():,} tokens (sequence {int(lengths.argmin()):,})"
    if (offsets != expected).any():
        at = int((offsets != expected).argmax())
        return f"puts sequence {at:,} at byte {offsets[at]:,}, but the one before ends at {expected[at]:,}"
    if not len(boundaries) or boundaries[0] or boundaries[-1] != len(lengths):
        found = f"from sequence {boundaries[0]:,} to {boundaries[-1]:,}" if len(boundaries) else "none"
        return f"has documents {found}, but {len(lengths):,} sequences"
    if (np.diff(boundaries) < 0).any():
        at = int((np.diff(boundaries) < 0).argmax())
        return f"lets document {at:,} end at sequence {boundaries[at + 1]:,}, before it begins at {boundaries[at]:,}"
    return None
