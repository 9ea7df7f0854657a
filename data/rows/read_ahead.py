"""Fetches shards behind a URL before a row needs them. The next rows are known, because order is a function of position.

    position --blend--> next rows --> their shards, by first need --> local copies, as many as fit the budget

A shard is *needed* until its last row, among the rows examined so far, has been read. Threads fetch shards in the order in
which they are first needed, and examine further rows when space becomes free. So no copy is evicted before it was read (if
only this run uses the cache). If a shard cannot be fetched, the first row that needs it tries again and reports the error.
"""

import logging
import threading
from dataclasses import dataclass

import numpy as np

from data.order.blend import Blend
from data.order.curriculum import WINDOW_ROWS
from data.rows.packing import STRETCH_ROWS, Rows
from data.store.cache import RemoteFolder
from data.store.manifest import ShardEntry
from recipes.schema.errors import DataError

_BUDGET_FRACTION = 0.9
"""Fraction of the cache's budget for needed shards. The rest is for other readers."""
_MOST_ROWS_AHEAD = 1 << 18
"""Rows examined ahead of the position, at most. They are billions of tokens if rows are long, and take less than a second."""
_POLL_S = 0.2
log = logging.getLogger(__name__)


@dataclass
class _Need:
    """A shard that later rows need."""

    entry: ShardEntry
    last: int
    """Last of the examined positions that needs it."""
    is_begun: bool = False
    """Whether a thread has begun to fetch it."""


class FetchAhead:
    """Threads that copy the next shards to the disk. Close it when reading ends."""

    def __init__(self, blend: Blend, rows: list[Rows], remote: RemoteFolder, *, position: int, threads: int) -> None:
        self.position = position
        """Position of the next row to read. The reader sets it and never waits for a fetch."""
        self._blend, self._rows, self._remote = blend, rows, remote
        self._limit = _BUDGET_FRACTION * remote.budget_bytes
        self._lock = threading.Lock()
        self._needed: dict[tuple[int, int], _Need] = {}
        self._examined = position
        self._is_full = False
        self._shard_count = sum(len(part.stream.entries) for part in rows)
        self._closing = threading.Event()
        for number in range(threads):
            threading.Thread(target=self._run, name=f"fetch-{number}", daemon=True).start()

    def close(self) -> None:
        """Start no more fetches. Those in progress are completed."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                entry = self._next()
                present = [
                    (f"{need.entry.path}.{suffix}", need.entry.files[suffix])
                    for need in self._needed.values()
                    for suffix in need.entry.token_files
                ]
            if entry is None:
                self._closing.wait(_POLL_S)
                continue
            self._remote.touch(present)
            try:
                for suffix in entry.token_files:
                    self._remote.local(f"{entry.path}.{suffix}", entry.files[suffix])
            except DataError as error:
                log.warning("%s It was fetched ahead of need. The first row that needs it tries again.", error)

    def _next(self) -> ShardEntry | None:
        """The shard to fetch next. None if all are fetched, or while there is no space."""
        gone = [key for key, need in self._needed.items() if need.last < self.position]
        for key in gone:
            del self._needed[key]
        self._is_full &= not gone
        self._examined = max(self._examined, self.position)
        while True:
            for need in self._needed.values():
                if not need.is_begun:
                    need.is_begun = True
                    return need.entry
            stop = min(self._examined + WINDOW_ROWS, self._blend.stop or self._examined + WINDOW_ROWS)
            is_all = len(self._needed) == self._shard_count
            if is_all or self._is_full or stop <= self._examined or stop > self.position + _MOST_ROWS_AHEAD:
                return None
            self._examine(stop)

    def _examine(self, stop: int) -> None:
        """Mark as needed the shards of the rows up to `stop`, or to the first row whose shard does not fit the budget."""
        taken = sum(_size(need.entry) for need in self._needed.values())
        found = self._shards(self._examined, stop)
        for key, (first, _) in sorted(found.items(), key=lambda item: item[1]):
            if key in self._needed:
                continue
            entry = self._rows[key[0]].stream.entries[key[1]]
            taken += _size(entry)
            if taken > self._limit:
                self._is_full, stop = True, first
                found = self._shards(self._examined, stop)
                break
            self._needed[key] = _Need(entry, first)
        for key, (_, last) in found.items():
            self._needed[key].last = last
        self._examined = stop

    def _shards(self, start: int, stop: int) -> dict[tuple[int, int], tuple[int, int]]:
        """{(source, shard): (first, last position that needs it)}, for the rows from start to stop."""
        found: dict[tuple[int, int], tuple[int, int]] = {}
        if start == stop:
            return found
        draw = self._blend.draw(np.arange(start, stop))
        for source in np.unique(draw.source):
            rows, at = self._rows[source], np.flatnonzero(draw.source == source)
            unit = STRETCH_ROWS if rows.best_fit else 1  # a best-fit row needs its whole stretch
            begin = draw.row[at] // unit * unit
            # first and last token that is read: the one before the first label, and the last label
            low = np.maximum(begin * rows.row_tokens - 1, 0)
            high = np.minimum(begin + unit, rows.count) * rows.row_tokens - 1
            lows, highs = (np.searchsorted(rows.stream.shard_starts, edge, side="right") - 1 for edge in (low, high))
            for shard in range(int(lows.min()), int(highs.max()) + 1):
                mine = np.flatnonzero((lows <= shard) & (shard <= highs))
                if len(mine):
                    found[int(source), shard] = start + int(at[mine[0]]), start + int(at[mine[-1]])
        return found


def _size(entry: ShardEntry) -> int:
    return sum(entry.files[suffix].bytes for suffix in entry.token_files)
