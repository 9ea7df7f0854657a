"""The origin (file and record) of each document of a shard, stored next to the shard.

    PREFIX.origins    numpy .npz: `files` (one name a line; if a name contains a line break, each name ends with a zero byte
                      instead), `starts` (first document of each file, then the number of documents), `records` (record number
                      of every document, from 0: line, row, or 0 for a text file)

It takes four bytes a document. Documents of one file are successive, in the order of its records. Chats are in the order of
their rows, so a file may be named several times, and one record may be several documents.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.store.manifest import ShardEntry
from recipes.schema.errors import DataError


@dataclass(frozen=True)
class Origin:
    """File and record that one document was read from."""

    file: str
    """The name of the source's file at the time of preparing."""
    record: int
    """Number of the record in the file, from 0: line of a jsonl file, row of a table, document of a Megatron set."""


@dataclass(frozen=True)
class Origins:
    """Origins of one shard entry's documents, numbered from 0."""

    files: list[str]
    starts: np.ndarray
    """int64 [files + 1]: first document of each file, then the number of documents."""
    records: np.ndarray
    """int64 [documents]: record numbers."""

    def of(self, document: int) -> Origin:
        """Origin of document number `document` of the entry."""
        file = int(np.searchsorted(self.starts, document, side="right")) - 1
        return Origin(self.files[file], int(self.records[document]))


def pack_origins(files: list[str], starts: list[int], records: np.ndarray) -> bytes:
    """Content of an origins file. starts: first document of each file; records: uint32 [documents]."""
    stream = io.BytesIO()
    text = "".join(f"{name}\0" for name in files) if any("\n" in name for name in files) else "\n".join(files)
    names = np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8)  # names on a disk may be any bytes
    bounds = np.asarray([*starts, len(records)], dtype="<i8")
    np.savez(stream, files=names, starts=bounds, records=records.astype("<u4"))
    return stream.getvalue()


def read_origins(folder: Path, entry: ShardEntry, *, file: Path | None = None) -> Origins:
    """Origins of an entry's documents. file: the origins file, if it is not in `folder`. DataError if it is damaged."""
    if "origins" not in entry.files:  # a Megatron set, read in place
        numbers = np.arange(entry.first_document, entry.first_document + entry.documents)
        return Origins([f"{entry.prefix(folder)}.bin"], np.array([0, entry.documents]), numbers)
    path = file or entry.file(folder, "origins")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            text = bytes(arrays["files"]).decode(errors="surrogateescape")
            starts, records = arrays["starts"].astype(np.int64), arrays["records"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} cannot be read as origins of documents: {error}. Prepare the data again.") from error
    files = text.split("\0")[:-1] if text.endswith("\0") else text.split("\n")
    if len(starts) != len(files) + 1 or len(records) != entry.documents or int(starts[-1]) != entry.documents:
        raise DataError(
            f"{path} does not match the {entry.documents:,} documents of its shard. Prepare the data again."
        )
    return Origins(files, starts, records + entry.first_record)
