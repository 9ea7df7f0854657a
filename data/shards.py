"""Token shards on disk, in Megatron-LM's indexed format, and the manifest that vouches for them.

    NAME.bin    token ids of all documents, one after the other, uint16 or int32
    NAME.idx    "MMIDIDX\\0\\0", version 1, dtype code, counts; then lengths int32, byte offsets int64, document ends int64
    manifest.json   what lies here: tokenizer, sources, counts, sizes and checksums of every file

Data moves both ways between Megatron-LM and this project unchanged. Files are written aside, made durable, then renamed.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
"""Megatron's dtype codes for the two kinds token ids are stored as."""
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
MANIFEST = "manifest.json"
FORMAT = 1


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How ids of a vocabulary are stored: uint16 below 65,500 as in Megatron, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class ShardWriter:
    """Writes one shard, document by document. Nothing appears under its name before `finish`.

    Used as a context manager: leaving it by an error removes what was written aside.
    """

    def __init__(self, prefix: Path, *, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self.vocab_size = vocab_size
        self.lengths: list[int] = []
        self._aside = Path(f"{prefix}.bin.writing")
        self._stream = self._aside.open("wb")

    def add(self, ids: Sequence[int]) -> None:
        """Append one document, its end-of-document token included. DataError for an id outside the vocabulary."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size == 0 or array.min() < 0 or array.max() >= self.vocab_size:
            raise DataError(
                f"{self.prefix}: a document is empty or has ids outside the vocabulary of {self.vocab_size:,}"
            )
        self._stream.write(array.astype(self.dtype).tobytes())
        self.lengths.append(array.size)

    def finish(self) -> None:
        """Make the shard durable and visible: the token file first, the index last."""
        _close_durably(self._stream)
        count = len(self.lengths)
        lengths = np.asarray(self.lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype=np.int64)
        offsets = np.concatenate([[0], ends[:-1]]).astype("<i8") * self.dtype.itemsize if count else ends.astype("<i8")
        aside = Path(f"{self.prefix}.idx.writing")
        with aside.open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], count, count + 1))
            stream.write(lengths.tobytes())
            stream.write(offsets.tobytes())
            stream.write(np.arange(count + 1, dtype="<i8").tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        self._aside.rename(f"{self.prefix}.bin")
        aside.rename(f"{self.prefix}.idx")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stream.close()
            self._aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Shard:
    """One shard, memory-mapped. `ends[d]` is where document d stops in `tokens`."""

    prefix: Path
    tokens: np.ndarray
    ends: np.ndarray


def open_shard(prefix: Path) -> Shard:
    """Map a shard and check that index and token file agree. DataError names the file that does not fit."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise DataError(f"{path} is missing. Prepare the data again: python -m data.prepare -cn <recipe>.")
    raw = index.read_bytes()
    if len(raw) < _HEADER.size:
        raise DataError(f"{index} is {len(raw)} bytes long: too short for a shard index. Prepare the data again.")
    magic, version, code, count, documents = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != 1:
        raise DataError(f"{index} is not a Megatron index of version 1. Prepare the data again.")
    if code not in _DTYPES:
        raise DataError(f"{index} stores tokens as dtype code {code}; only uint16 (8) and int32 (4) hold token ids.")
    expected = _HEADER.size + count * 12 + documents * 8
    if len(raw) != expected:
        raise DataError(f"{index} is {len(raw):,} bytes long, {expected:,} expected: it is damaged. Prepare again.")
    dtype = _DTYPES[code]
    lengths = np.frombuffer(raw, dtype="<i4", count=count, offset=_HEADER.size)
    # Megatron may split a document into several sequences; the document index says where documents end.
    boundaries = np.frombuffer(raw, dtype="<i8", count=documents, offset=_HEADER.size + count * 12)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[boundaries[1:]]
    size = tokens.stat().st_size
    total = int(ends[-1]) if len(ends) else 0
    if size != total * dtype.itemsize:
        raise DataError(
            f"{tokens} is {size:,} bytes long, its index says {total * dtype.itemsize:,}: truncated or replaced. "
            f"Prepare the data again."
        )
    array = np.memmap(tokens, dtype=dtype, mode="r") if total else np.empty(0, dtype=dtype)
    return Shard(prefix=prefix, tokens=array, ends=ends)


@dataclass(frozen=True)
class SplitEntry:
    """One split of one source: a shard and what it holds."""

    shard: str
    """Name of the shard's files in the folder, without suffix."""
    tokens: int
    documents: int
    text_bytes: int
    files: dict[str, dict[str, Any]]
    """By file name: `bytes` and `sha256`."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared data holds."""

    tokenizer: str
    """Fingerprint of the tokenizer the ids belong to."""
    vocab_size: int
    eod: int
    request: dict[str, Any]
    """The recipe fields the content depends on."""
    sources: dict[str, dict[str, SplitEntry]] = field(default_factory=dict)
    """By source, then split (`train`, `heldout`)."""
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """sha256 of the content: the identity of this data."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def describe_split(folder: Path, shard: str, *, tokens: int, documents: int, text_bytes: int) -> SplitEntry:
    """The manifest's entry for a finished shard, checksums read back from the disk."""
    files = {}
    for suffix in ("bin", "idx"):
        path = folder / f"{shard}.{suffix}"
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return SplitEntry(shard=shard, tokens=tokens, documents=documents, text_bytes=text_bytes, files=files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` aside and rename it: its presence says that the data is complete."""
    aside = folder / f"{MANIFEST}.writing"
    with aside.open("w") as stream:
        json.dump(asdict(manifest), stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(folder / MANIFEST)


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest:
    """The manifest of a folder, sizes checked; with `verify` every checksum too. DataError names what is wrong."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"no prepared data in {folder} (no {MANIFEST}). Prepare it: python -m data.prepare -cn <recipe>."
        )
    try:
        raw = json.loads(path.read_text())
        sources = {
            name: {split: SplitEntry(**entry) for split, entry in splits.items()}
            for name, splits in raw.pop("sources").items()
        }
        manifest = Manifest(sources=sources, **raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a data manifest: {error}. Prepare the data again.") from error
    if manifest.format != FORMAT:
        raise DataError(f"{path} has format {manifest.format}; this version reads {FORMAT}. Prepare the data again.")
    for splits in manifest.sources.values():
        for entry in splits.values():
            for name, facts in entry.files.items():
                _check_file(folder / name, facts, verify=verify)
    return manifest


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_file(path: Path, facts: dict[str, Any], *, verify: bool) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != facts["bytes"]:
        found = "missing" if size is None else f"{size:,} bytes long"
        raise DataError(f"{path} is {found}, the manifest says {facts['bytes']:,} bytes. Prepare the data again.")
    if verify and file_sha256(path) != facts["sha256"]:
        raise DataError(f"{path} does not match its checksum: it was changed or damaged. Prepare the data again.")


def _close_durably(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
