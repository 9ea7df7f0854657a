"""Rows out of a source's stream of tokens: each row `row_tokens` labels, every token a label exactly once.

    label   t_0   t_1  ...      input   (token before t_0)   t_0   ...

The input for a document's first token is the end-of-document token before it, both in the stream and in a row. So the first
token is predicted too, and a document in a row sees the same inputs as alone: an end-of-document token, then itself.

*chunk*: row r holds labels r S ... r S + S of the stream.
*best fit* (Ding et al., arXiv 2404.10830): the labels of each stretch of 64 rows stay in it, but its documents are arranged
so that few are cut. Documents longer than a row are cut into rows. The rest are placed longest first, each in the row with the
least room that it fits in; documents that fit in no row fill the gaps, cut as needed. So rows are full, no label is padding,
the number of rows is the same, and a row is a pure function of its stretch: nothing is stored or built at start-up.

The tokens after the last whole row of a source are not used; `Rows.cropped_tokens` counts them.
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.native import rows as native
from data.rows.reader import OpenShard, TokenStream
from data.system.recent import Recent

STRETCH_ROWS = 64
"""Rows that best-fit packing arranges together."""
_CACHE_BYTES = 32 << 20
"""Memory for packed stretches, shared equally by all sources: enough for over two billion tokens of web text."""


class Piece(NamedTuple):
    """Part of a document in a row: labels `start` to `stop` of the stream."""

    start: int
    stop: int


class Packed(NamedTuple):
    """A packed stretch."""

    numbers: np.ndarray
    """int32: number of the first piece of each row, and of all pieces; then (start, size) of each piece by row, counted from
    the stretch's first label."""
    address: int
    """Of the numbers in memory."""
    rows: int
    entry: int
    """The stream's entry with all of it and the token before it; -1 without such an entry, or if compiled code cannot read it."""
    start: int
    """Token of that entry that is its first label."""


class Rows:
    """The rows of a source's stream."""

    def __init__(
        self,
        stream: TokenStream,
        *,
        row_tokens: int,
        eod: int,
        best_fit: bool,
        sources: int = 1,
        mask: "Rows | None" = None,
    ) -> None:
        """sources: how many share the memory for packed stretches. mask: rows of 1 for labels that are learned, else 0."""
        self.mask = mask
        """None if all labels are learned."""
        self.stream = stream
        self.row_tokens = row_tokens
        self.best_fit = best_fit
        self._eod = eod
        self._stretches: Recent[int, Packed] = Recent(
            most_weight=_CACHE_BYTES // sources, weigh=lambda packed: packed.numbers.nbytes
        )

    @property
    def count(self) -> int:
        """Whole rows."""
        return self.stream.tokens // self.row_tokens

    @property
    def cropped_tokens(self) -> int:
        """Tokens after the last whole row."""
        return self.stream.tokens - self.count * self.row_tokens

    def rows_by_shard(self) -> tuple[int, ...]:
        """Rows that begin in each shard of the stream, without shards in which none begins."""
        edges = np.minimum(-(-self.stream.shard_starts // self.row_tokens), self.count)
        edges[-1] = self.count
        return tuple(int(rows) for rows in np.diff(edges) if rows)

    def read_chunks(self, rows: list[int], out: np.ndarray, where: list[int]) -> None:
        """Rows of the plain order into out[where], [row_tokens + 1] each: inputs [:-1] and labels [1:]."""
        starts = [row * self.row_tokens - 1 for row in rows]
        if -1 in starts:
            for place in (w for w, start in zip(where, starts, strict=True) if start < 0):
                out[place, 0] = self._eod
                self.stream.read(0, out[place, 1:])
            where = [w for w, start in zip(where, starts, strict=True) if start >= 0]
            starts = [start for start in starts if start >= 0]
        self.stream.read_rows(starts, out, where)

    def assemble(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of a row made of pieces, each [row_tokens] of the stream's dtype."""
        inputs = np.empty(self.row_tokens, dtype=self.stream.dtype)
        labels = np.empty_like(inputs)
        slot = 0
        for piece in pieces:
            size = piece.stop - piece.start
            part = np.empty(size + 1, dtype=self.stream.dtype)
            if piece.start:
                self.stream.read(piece.start - 1, part)
            else:
                part[0] = self._eod
                self.stream.read(0, part[1:])
            inputs[slot : slot + size], labels[slot : slot + size] = part[:-1], part[1:]
            slot += size
        return inputs, labels

    def read_labels(self, start: int, count: int) -> np.ndarray:
        """`count` labels from `start` of the stream on, of its dtype."""
        labels = np.empty(count, dtype=self.stream.dtype)
        self.stream.read(start, labels)
        return labels

    def pieces(self, row: int) -> list[Piece]:
        """The documents, or parts of them, of a row, in its order."""
        if not self.best_fit:
            return self.cut(row * self.row_tokens, (row + 1) * self.row_tokens)
        stretch, place = divmod(row, STRETCH_ROWS)
        return self._unpack(stretch, self._packed([stretch])[stretch], place)

    def rows_of(self, start: int, stop: int) -> list[int]:
        """Rows with labels from `start` to `stop` of the stream; labels beyond the last whole row are in no row."""
        stop = min(stop, self.count * self.row_tokens)
        if start >= stop:
            return []
        if not self.best_fit:
            return list(range(start // self.row_tokens, (stop - 1) // self.row_tokens + 1))
        size = self.row_tokens * STRETCH_ROWS
        found = []
        for stretch in range(start // size, (stop - 1) // size + 1):
            packed = self._packed([stretch])[stretch]
            for place in range(packed.rows):
                if any(piece.start < stop and start < piece.stop for piece in self._unpack(stretch, packed, place)):
                    found.append(stretch * STRETCH_ROWS + place)
        return found

    def boundaries(self, row: int) -> np.ndarray:
        """Slots of a row of the plain order, other than 0, at which another document begins."""
        low = row * self.row_tokens
        starts, _ = self.stream.document_starts(low + 1, low + self.row_tokens)
        return starts - low

    def cut(self, low: int, high: int) -> list[Piece]:
        """The documents between two positions of the stream; those that cross one are cut there."""
        starts, _ = self.stream.document_starts(low + 1, high)
        bounds = [low, *starts.tolist(), high]
        return [Piece(a, b) for a, b in itertools.pairwise(bounds)]

    def plan(self, rows: list[int], where: list[int], plan: native.Plan) -> list[int]:
        """Add to `plan`, for compiled code: read row rows[i] to place where[i] of a batch. -> the places of rows it cannot read:
        those in two shards, and the first of the stream, which has no token before it."""
        left: list[int] = []
        opened: dict[int, OpenShard] = {}
        size, shards, numbers, bounds = self.row_tokens, plan.shards, plan.numbers, self.stream.bounds
        packed: Packed | None = None
        stretches = self._packed([row // STRETCH_ROWS for row in rows]) if self.best_fit else {}
        for row, out in zip(rows, where, strict=True):
            if self.best_fit:
                packed = stretches[row // STRETCH_ROWS]
                entry, start = packed.entry, packed.start
            else:
                start = row * size  # TokenStream.entry_with, inlined: this runs for every row
                entry = bisect.bisect_right(bounds, start - 1) - 1
                if start == 0 or start + size > bounds[entry + 1]:
                    entry = -1
                start -= bounds[entry]
            if entry < 0:
                left.append(out)
                continue
            shard = opened.get(entry)
            if shard is None:
                shard = opened[entry] = self.stream.open(entry)
            shards.append(shard)
            if packed is None:
                numbers.extend((shard.record, start, 0, 0, 0, out))
            else:
                plan.keep.append(packed)
                numbers.extend((shard.record, start, packed.address, packed.rows, row % STRETCH_ROWS, out))
        return left

    def _unpack(self, stretch: int, packed: Packed, place: int) -> list[Piece]:
        low, after = stretch * STRETCH_ROWS * self.row_tokens, packed.rows + 1
        first, stop = packed.numbers[place : place + 2].tolist()
        places = packed.numbers[after + 2 * first : after + 2 * stop].tolist()
        return [Piece(low + start, low + start + size) for start, size in zip(places[::2], places[1::2], strict=True)]

    def _packed(self, wanted: Sequence[int]) -> dict[int, Packed]:
        """Packed stretches by number. Those that are not cached are packed in one call."""
        found = {number: packed for number in wanted if (packed := self._stretches.get(number)) is not None}
        missing = [number for number in dict.fromkeys(wanted) if number not in found]
        for number, packed in self._pack(missing).items() if missing else ():
            found[number] = self._stretches.keep(number, packed)
        return found

    def _pack(self, stretches: Sequence[int]) -> dict[int, Packed]:
        size, bounds = STRETCH_ROWS * self.row_tokens, self.stream.bounds
        found: dict[int, Packed] = {}
        opened: dict[int, OpenShard] = {}
        plans: list[tuple[int, int, native.Stretch]] = []
        for number in stretches:
            start, rows = number * size, min(STRETCH_ROWS, self.count - number * STRETCH_ROWS)
            entry, before = self.stream.entry_with(start - 1, start + rows * self.row_tokens)
            if entry >= 0:
                shard = opened.get(entry)
                if shard is None:
                    shard = opened[entry] = self.stream.open(entry)
                guess = 2 * len(shard.search) * size // max(1, bounds[entry + 1] - bounds[entry])
                plans.append((number, entry, native.Stretch(shard.record, before + 1, rows, guess)))
        packed = native.pack([plan for *_, plan in plans], row_tokens=self.row_tokens)
        for (number, entry, plan), numbers in zip(plans, packed, strict=True):
            if numbers is not None:
                found[number] = Packed(numbers, native.address_of(numbers), plan.rows, entry, plan.low)
        for number in stretches:
            if number not in found:
                found[number] = self._pack_plainly(number)
        return found

    def _pack_plainly(self, number: int) -> Packed:
        low, rows = number * STRETCH_ROWS * self.row_tokens, min(STRETCH_ROWS, self.count - number * STRETCH_ROWS)
        high = low + rows * self.row_tokens
        arranged = best_fit(self.cut(low, high), rows=rows, row_tokens=self.row_tokens)
        ends = itertools.accumulate((len(pieces) for pieces in arranged), initial=0)
        places = (n for pieces in arranged for p in pieces for n in (p.start - low, p.stop - p.start))
        is_short = self.row_tokens <= native.LONGEST_ROW
        numbers = np.array([*ends, *places], dtype=np.int32 if is_short else np.int64)
        entry, before = self.stream.entry_with(low - 1, high) if is_short else (-1, 0)
        return Packed(numbers, native.address_of(numbers), rows, entry, before + 1)


def best_fit(documents: Sequence[Piece], *, rows: int, row_tokens: int) -> list[list[Piece]]:
    """Arrange documents that together are rows x row_tokens long into full rows. -> the pieces of each row.

    Best fit decreasing. Documents longer than a row give whole rows first; documents that fit in no row fill the gaps.
    """
    packed: list[list[Piece]] = []
    rest: list[Piece] = []
    for document in documents:
        start = document.start
        while document.stop - start > row_tokens:
            packed.append([Piece(start, start + row_tokens)])
            start += row_tokens
        rest.append(Piece(start, document.stop))
    rest.sort(key=lambda piece: (piece.start - piece.stop, piece.start))
    gaps: list[tuple[int, int]] = []  # (room, row), by room
    unplaced: list[Piece] = []
    for piece in rest:
        size = piece.stop - piece.start
        at = bisect.bisect_left(gaps, (size, 0))
        if at < len(gaps):
            room, row = gaps.pop(at)
            packed[row].append(piece)
        elif len(packed) < rows:
            room, row = row_tokens, len(packed)
            packed.append([piece])
        else:
            unplaced.append(piece)
            continue
        if room > size:
            bisect.insort(gaps, (room - size, row))
    for room, row in reversed(gaps):  # the unplaced pieces are together exactly as long as the gaps
        while room:
            piece = unplaced.pop()
            taken = min(room, piece.stop - piece.start)
            packed[row].append(Piece(piece.start, piece.start + taken))
            room -= taken
            if piece.start + taken < piece.stop:
                unplaced.append(Piece(piece.start + taken, piece.stop))
    for pieces in packed:
        pieces.sort()
    return packed
