"""A source's shards as one stream of tokens. Shards are opened when first needed.

    TokenStream(entries, pool).read_rows(starts, out)       tokens of rows that begin at given positions of the stream
                              .document_starts(low, high)   positions at which documents begin

Tokens and indices are read with `pread`, not through a memory map. So a file that is cut short while it is read gives an
error that names it instead of a SIGBUS, and pages of the files do not count as this process's memory. After each read the
file's size and modification time are checked. If it changed since it was opened, it is verified and read again
(`data.store.verify`).
"""

import bisect
import contextlib
import ctypes
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from data.native.rows import ShardRecord
from data.store.cache import Activity
from data.store.manifest import ShardEntry
from data.store.shards import Header, read_header
from data.system.recent import Recent
from recipes.schema.errors import DataError

_OPEN_SHARDS = 4096
"""Shards open at a time, two files each. Many, because each row of a shuffled source is in another shard."""
_OPEN_COPIES = 64
"""The same for copies that other processes may remove. Fewer, because a removed file takes disk space while it is open."""
_OTHER_FILES = 512
"""File descriptors reserved for the rest of the process if the limit on open files is low."""
_STARTS_IN_MEMORY = 8 << 20
"""Documents, of all open shards, whose starts are in memory (8 bytes each). Other starts are read when needed."""
_STAT_EVERY_S = 1.0
"""Time between two checks whether a shard's path still names the opened file, or another one that replaced it."""


class StartsOnDisk:
    """Byte offsets at which the documents of an entry begin, read from the index when needed.

    Each read checks that the index is still the file that was opened. DataError names it if it is not.
    """

    def __init__(self, index: Path, header: Header, first: int, count: int) -> None:
        self._index, self._header, self._first, self._count = index, header, first, count
        self._is_plain = header.documents == header.sequences + 1
        self._fd = os.open(index, os.O_RDONLY)
        self._close = os.close  # bound here: at exit, modules are cleared before __del__ runs
        found = os.fstat(self._fd)
        self._opened = found.st_size, found.st_mtime_ns

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self._close(self._fd)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, which: int) -> int: ...
    @overload
    def __getitem__(self, which: slice) -> np.ndarray: ...
    def __getitem__(self, which: int | slice) -> int | np.ndarray:
        if isinstance(which, int):
            return int(self._read(which, which + 1)[0])
        start, stop, _ = which.indices(self._count)
        return self._read(start, stop)

    def describe(self, record: ShardRecord) -> None:
        """Write into compiled code's record where the offsets are. It cannot read offsets of documents of several sequences."""
        if not self._is_plain:
            record.documents = -1  # not known: rows.c leaves what needs them to Python
        record.index_fd, (record.index_size, record.index_mtime_ns) = self._fd, self._opened
        record.index_at = self._header.offsets_at + 8 * self._first

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Byte offsets of documents start to stop, int64. Megatron may split a document into several sequences."""
        sequences = (
            None if self._is_plain else self._numbers(self._header.documents_at, self._first + start, stop - start)
        )
        if sequences is None or not len(sequences):
            return self._numbers(self._header.offsets_at, self._first + start, stop - start)
        low = int(sequences[0])
        return self._numbers(self._header.offsets_at, low, int(sequences[-1]) + 1 - low)[sequences - low]

    def _numbers(self, at: int, first: int, count: int) -> np.ndarray:
        out, done = np.empty(count, dtype="<i8"), 0
        while done < out.nbytes:
            got = os.preadv(self._fd, [out.view(np.uint8)[done:]], at + 8 * first + done)
            if not got:
                break
            done += got
        found = os.fstat(self._fd)
        if done < out.nbytes or (found.st_size, found.st_mtime_ns) != self._opened:
            raise DataError(
                f"{self._index} was changed or cut short while it was read. Prepare the data again, into another data.folder."
            )
        return out


class OpenShard:
    """One shard entry, open for reading. It is closed when nothing refers to it any more."""

    def __init__(self, entry: ShardEntry, tokens: Path, index: Path, *, may_vanish: bool, keep_starts: bool) -> None:
        """may_vanish: other processes may remove the file while it is read. keep_starts: store the documents' offsets in memory.

        DataError if index and manifest differ.
        """
        self.path = tokens
        self.reading = f"reading {tokens}"
        self.entry = entry
        self._may_vanish = may_vanish
        header = read_header(index)
        if header.dtype != np.dtype(entry.dtype):
            raise DataError(
                f"{index} has tokens of type {header.dtype.name}, but the manifest says {entry.dtype}: it was replaced. Prepare "
                f"the data again."
            )
        first, count = entry.first_document, entry.documents
        if first + count + 1 > header.documents:
            raise DataError(
                f"{index} has {header.documents - 1:,} documents, but the manifest says {first + count:,} or more: it was "
                f"replaced. Prepare the data again."
            )
        on_disk = StartsOnDisk(index, header, first, count)
        self.starts: np.ndarray | StartsOnDisk = on_disk[0:count] if keep_starts else on_disk
        """Byte offset at which each document of the entry begins."""
        self.search: memoryview[int] | StartsOnDisk = (
            memoryview(self.starts) if isinstance(self.starts, np.ndarray) else on_disk
        )
        """`starts` for `bisect`, which takes a third of the time on a memoryview, because its items are Python integers."""
        self.starts_in_memory = count if keep_starts else 0
        self.itemsize = header.dtype.itemsize
        self.first_byte = self.search[0] if count else 0
        self._fd, self._close = os.open(tokens, os.O_RDONLY), os.close
        found = os.fstat(self._fd)
        self._opened = found.st_size, found.st_mtime_ns
        self._inode = found.st_ino
        self._checked_at = time.monotonic()
        is_last = first + count + 1 == header.documents
        end = found.st_size if is_last else on_disk[count]
        if end - self.first_byte != entry.tokens * self.itemsize or end > found.st_size:
            raise DataError(
                f"{tokens} has {(end - self.first_byte) // self.itemsize:,} tokens, but the manifest says "
                f"{entry.tokens:,}: truncated or replaced. Prepare the data again."
            )
        self._record = ShardRecord(
            fd=self._fd,
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
            may_vanish=may_vanish,
            first_byte=self.first_byte,
            shift=self.itemsize.bit_length() - 1,
            is_signed=header.dtype.kind == "i",
            documents=count,
        )
        if isinstance(self.starts, np.ndarray):
            self._record.starts = self.starts.ctypes.data
        else:
            on_disk.describe(self._record)
        self.record = ctypes.addressof(self._record)
        """Address of the record from which compiled code reads this entry. It is valid as long as this object exists."""

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self._close(self._fd)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous, of the entry's dtype) with tokens from `start` of the entry on."""
        at = self.first_byte + start * self.itemsize
        got = os.preadv(self._fd, [out], at)
        size = out.nbytes
        while got < size:  # a signal may interrupt a read
            more = os.preadv(self._fd, [out.view(np.uint8).reshape(-1)[got:]], at + got)
            if not more:
                raise DataError(
                    f"{self.path} ends at byte {at + got:,}, but it was longer when it was opened: it was cut short. Prepare the "
                    f"data again."
                )
            got += more

    def is_unchanged(self) -> bool:
        """Whether the file is the same as when it was opened. Call it after a read: True means that the bytes are valid."""
        found = os.fstat(self._fd)
        if (found.st_size, found.st_mtime_ns) != self._opened:
            return False
        if not found.st_nlink:  # the file was removed; its open descriptor still reads the old bytes
            return self._may_vanish
        return self.is_still_at_its_path()

    def is_still_at_its_path(self) -> bool:
        """Whether the path still names this file, checked at most once a second."""
        if time.monotonic() - self._checked_at > _STAT_EVERY_S:
            self._checked_at = time.monotonic()
            try:
                return os.stat(self.path).st_ino == self._inode
            except OSError:
                return False
        return True


class ShardPool:
    """The open shards of all readers, limited in number. Thread-safe."""

    def __init__(
        self, find: Callable[[ShardEntry, str], Path], *, activity: Activity, may_vanish: bool = False
    ) -> None:
        """find(entry, suffix): a verified local file of a shard. may_vanish: other processes may remove these files."""
        self._may_vanish = may_vanish
        self._find = find
        self.activity = activity
        room = min(_OPEN_COPIES, _OPEN_SHARDS) if may_vanish else _room_for_shards()
        self._open: Recent[tuple[str, int], OpenShard] = Recent(most=room, weigh=lambda shard: shard.starts_in_memory)

    def open(self, entry: ShardEntry) -> OpenShard:
        """The entry's shard. Opens it if it is not open."""
        key = entry.path, entry.first_document
        found = self._open.get(key)
        if found is not None:
            return found
        keep_starts = self._open.weight + entry.documents <= _STARTS_IN_MEMORY
        with self.activity.of(f"opening {entry.path}"):
            try:
                shard = self._opened(entry, keep_starts=keep_starts)
            except OSError as error:
                raise DataError(
                    f"shard {entry.path} cannot be opened: {error.strerror or error}. Check data.folder and its disk."
                ) from error
        return self._open.keep(key, shard)

    def _opened(self, entry: ShardEntry, *, keep_starts: bool) -> OpenShard:
        for tries_left in reversed(range(3)):
            try:
                paths = self._find(entry, "bin"), self._find(entry, "idx")
                return OpenShard(entry, *paths, may_vanish=self._may_vanish, keep_starts=keep_starts)
            except FileNotFoundError:  # another process evicted it between finding and opening
                if not (self._may_vanish and tries_left):
                    raise
        raise AssertionError("returned or raised")

    def forget(self, shard: OpenShard) -> None:
        """Remove a shard from the pool. It is opened and verified again when it is next read."""
        self._open.drop((shard.entry.path, shard.entry.first_document), shard)


def _room_for_shards() -> int:
    """Number of shards that may be open: _OPEN_SHARDS if the process's limit on open files allows it or can be raised."""
    wanted = 2 * _OPEN_SHARDS + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_SHARDS if soft == resource.RLIM_INFINITY else min(_OPEN_SHARDS, max(16, (soft - _OTHER_FILES) // 2))


class TokenStream:
    """The tokens of shard entries, one after the other. A position counts tokens from the start of the first entry."""

    def __init__(self, entries: Sequence[ShardEntry], pool: ShardPool) -> None:
        self.entries = list(entries)
        self._pool = pool
        self.shard_starts = np.concatenate([[0], np.cumsum([e.tokens for e in entries], dtype=np.int64)]).astype(
            np.int64
        )
        """Position at which each entry begins, then the position after the last token."""
        self.bounds: list[int] = self.shard_starts.tolist()
        """The same as a list, which `bisect` searches faster."""
        # Document d of the stream is in the entry i with documents_before[i] <= d < documents_before[i + 1].
        self.documents_before = np.concatenate([[0], np.cumsum([e.documents for e in entries], dtype=np.int64)])
        self.tokens = int(self.shard_starts[-1])
        self.documents = int(self.documents_before[-1])
        dtypes = {np.dtype(entry.dtype) for entry in entries}
        self.dtype = np.result_type(*dtypes) if dtypes else np.dtype("<u2")
        self._is_uniform = len(dtypes) <= 1

    def read_rows(self, starts: list[int], out: np.ndarray, where: list[int]) -> None:
        """Fill row where[i] of `out` ([rows, tokens], rows contiguous) with the tokens from starts[i] on."""
        length, bounds = out.shape[1], self.bounds
        is_uniform = self._is_uniform and out.dtype == self.dtype
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for row, start in zip(where, starts, strict=True):
            which = bisect.bisect_right(bounds, start) - 1
            if is_uniform and start + length <= bounds[which + 1]:
                by_shard.setdefault(which, []).append((row, start - bounds[which]))
            else:
                self.read(start, out[row])
        for which, places in by_shard.items():
            self._read_from(which, places, out)

    def open(self, which: int) -> OpenShard:
        """The open shard of an entry."""
        return self._pool.open(self.entries[which])

    def entry_with(self, start: int, stop: int) -> tuple[int, int]:
        """(entry, index in it of token `start`) if one entry has all tokens from start to stop, else (-1, 0)."""
        which = bisect.bisect_right(self.bounds, start) - 1
        if start < 0 or stop > self.bounds[which + 1]:
            return -1, 0
        return which, start - self.bounds[which]

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous, of `dtype`) with the tokens from `start` on, from one or more shards."""
        which, done = bisect.bisect_right(self.bounds, start) - 1, 0
        while done < len(out):
            count = min(len(out) - done, self.bounds[which + 1] - start - done)
            part = out[done : done + count]
            dtype = np.dtype(self.entries[which].dtype)
            raw = part if dtype == part.dtype else np.empty(count, dtype=dtype)
            self._read_from(which, [(0, start + done - self.bounds[which])], raw[None, :])
            if raw is not part:
                part[:] = raw
            done += count
            which += 1

    def document_starts(self, low: int, high: int) -> tuple[np.ndarray, int]:
        """The positions, low <= position < high, at which documents begin, and the number of the first such document."""
        parts, number = [], -1
        which = int(np.searchsorted(self.shard_starts, low, side="right")) - 1
        while which < len(self.entries) and self.shard_starts[which] < high:
            shard = self._pool.open(self.entries[which])
            base = int(self.shard_starts[which])
            lo, hi = (shard.first_byte + (place - base) * shard.itemsize for place in (low, high))
            a, b = bisect.bisect_left(shard.search, lo), bisect.bisect_left(shard.search, hi)
            if number < 0:
                number = int(self.documents_before[which]) + int(a)
            parts.append((shard.starts[a:b] - shard.first_byte) // shard.itemsize + base)
            which += 1
        return (np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)), max(number, 0)

    def document_at(self, position: int) -> int:
        """Number of the document at a position, counted over all entries."""
        which = bisect.bisect_right(self.bounds, position) - 1
        shard = self._pool.open(self.entries[which])
        place = shard.first_byte + (position - self.bounds[which]) * shard.itemsize
        return int(self.documents_before[which]) + bisect.bisect_right(shard.search, place) - 1

    def entry_of(self, document: int) -> tuple[int, int]:
        """(entry, number in it) of a document that is numbered over all entries."""
        which = int(np.searchsorted(self.documents_before, document, side="right")) - 1
        return which, document - int(self.documents_before[which])

    def document_lengths(self, which: int) -> np.ndarray:
        """Number of tokens of every document of an entry."""
        shard = self._pool.open(self.entries[which])
        starts = (shard.starts[:] - shard.first_byte) // shard.itemsize
        return np.diff(starts, append=self.entries[which].tokens)

    def document_span(self, document: int) -> tuple[int, int]:
        """(start, stop) in the stream of a document that is numbered over all entries."""
        which, local = self.entry_of(document)
        shard = self._pool.open(self.entries[which])
        base = int(self.shard_starts[which])
        start = base + (int(shard.starts[local]) - shard.first_byte) // shard.itemsize
        if local + 1 < len(shard.starts):
            return start, base + (int(shard.starts[local + 1]) - shard.first_byte) // shard.itemsize
        return start, int(self.shard_starts[which + 1])

    def _read_from(self, which: int, places: list[tuple[int, int]], out: np.ndarray) -> None:
        """Fill rows of `out` from one entry. places: (row, start in the entry). If the file changed meanwhile, reads again."""
        entry = self.entries[which]
        while True:
            shard = self._pool.open(entry)
            with self._pool.activity.of(shard.reading):
                for row, start in places:
                    shard.read(start, out[row])
            if shard.is_unchanged():
                return
            self._pool.forget(shard)
