"""Rows of a source's stream of tokens. A row has `row_tokens` labels; each token is a label exactly once.

    label   t_0   t_1  ...      input   (token before t_0)   t_0   ...

The input for a document's first token is the end-of-document token before it, in the stream and in a row. So the first token
is predicted too, and a document sees the same inputs in any row: an end-of-document token, then itself.

*chunk*: row r has labels r S to r S + S of the stream, with S = row_tokens.
*best fit* (Ding et al., arXiv 2404.10830): 64 successive rows are a *stretch*. It has the labels of 64 chunk rows,
but its documents are arranged so that few are cut. A document longer than a row is cut into rows. The rest are placed longest
first, each in the row with the least room that is enough for it. Documents that fit in no row are cut to fill the gaps. Rows
are full, no label is padding, and the number of rows does not change. A row depends on its stretch only, so nothing is stored
or built at start-up.

The tokens after the last whole row of a source are not used. `Rows.cropped_tokens` counts them.
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.media.decode import Decoded
from data.native import rows as native
from data.rows.media_rows import MediaRows
from data.rows.reader import OpenShard, TokenStream
from data.store.manifest import RANK_NUMBERS
from data.system.recent import Recent

STRETCH_ROWS = 64
"""Rows that best-fit packing arranges together."""
_CACHE_BYTES = 32 << 20
"""Memory for packed stretches, divided equally among the sources. Enough for over two billion tokens of web text."""


class Piece(NamedTuple):
    """Part of a document in a row: labels `start` to `stop` of the stream."""

    start: int
    stop: int


class Packed(NamedTuple):
    """A packed stretch, in the form that compiled code reads."""

    numbers: np.ndarray
    """int32 (int64 if rows are longer than `native.LONGEST_ROW`). First rows + 1 numbers: the index of each row's first piece,
    and the number of pieces. Then (start, size) of each piece, row by row; start counts from the stretch's first label."""
    address: int
    """Memory address of `numbers`."""
    rows: int
    """Rows of the stretch: 64, or fewer in the last stretch of a source."""
    entry: int
    """Index of the stream's entry that contains the whole stretch and the token before it. -1 if no single entry does, or if
    rows are too long for compiled code: then Python reads the rows."""
    start: int
    """Index, in that entry, of the stretch's first label."""


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
        ranks: TokenStream | None = None,
        media: MediaRows | None = None,
    ) -> None:
        """sources: number of sources that share the memory for packed stretches. mask: rows of 1 for labels that are learned,
        else 0. ranks: `RANK_NUMBERS` numbers for each document, as they are stored."""
        self.mask = mask
        """None if all labels are learned."""
        self.media = media
        """None if no document has media."""
        self._ranks = ranks
        self.stream = stream
        self.row_tokens = row_tokens
        self.best_fit = best_fit
        self._eod = eod
        self._stretches: Recent[int, Packed] = Recent(
            most_weight=_CACHE_BYTES // sources, weigh=lambda packed: packed.numbers.nbytes
        )

    @property
    def count(self) -> int:
        """Number of whole rows."""
        return self.stream.tokens // self.row_tokens

    @property
    def cropped_tokens(self) -> int:
        """Number of tokens after the last whole row."""
        return self.stream.tokens - self.count * self.row_tokens

    def rows_by_shard(self) -> tuple[int, ...]:
        """Number of rows that begin in each shard of the stream. Shards in which no row begins are left out."""
        edges = np.minimum(-(-self.stream.shard_starts // self.row_tokens), self.count)
        edges[-1] = self.count
        return tuple(int(rows) for rows in np.diff(edges) if rows)

    def read_chunks(self, rows: list[int], out: np.ndarray, where: list[int]) -> None:
        """Read row rows[i] of the plain order into out[where[i]] ([row_tokens + 1]): inputs are [:-1], labels [1:]."""
        starts = [row * self.row_tokens - 1 for row in rows]
        if -1 in starts:  # row 0 has no token before it: its first input is an end-of-document token
            for place in (w for w, start in zip(where, starts, strict=True) if start < 0):
                out[place, 0] = self._eod
                self.stream.read(0, out[place, 1:])
            where = [w for w, start in zip(where, starts, strict=True) if start >= 0]
            starts = [start for start in starts if start >= 0]
        self.stream.read_rows(starts, out, where)

    def assemble(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels) of a row made of pieces, each [row_tokens] of the stream's dtype."""
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
        """The documents of a row, or parts of them, in the row's order."""
        if not self.best_fit:
            return self.cut(row * self.row_tokens, (row + 1) * self.row_tokens)
        stretch, place = divmod(row, STRETCH_ROWS)
        return self._unpack(stretch, self._packed([stretch])[stretch], place)

    def rows_of(self, start: int, stop: int) -> list[int]:
        """Rows with a label between `start` and `stop` of the stream. Labels after the last whole row are in no row."""
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
        """Slots of a row of the plain order at which a document begins, except slot 0."""
        low = row * self.row_tokens
        starts, _ = self.stream.document_starts(low + 1, low + self.row_tokens)
        return starts - low

    @property
    def has_ranks(self) -> bool:
        """Whether the documents are ranked answers of preferences."""
        return self._ranks is not None

    def ranks_of(self, first: int, count: int) -> np.ndarray:
        """[count, RANK_NUMBERS] int16 of documents `first` to first + count: rank, and whether a group begins."""
        assert self._ranks is not None, "only of preferences"
        found = np.empty(count * RANK_NUMBERS, dtype=self._ranks.dtype)
        self._ranks.read(first * RANK_NUMBERS, found)
        return found.reshape(count, RANK_NUMBERS)

    def ranks_in(self, row: int) -> np.ndarray:
        """The same of the documents of a row. Rows of preferences are packed when they are prepared: none is cut."""
        starts, first = self.stream.document_starts(row * self.row_tokens, (row + 1) * self.row_tokens)
        return self.ranks_of(first, len(starts))

    def media_in(self, row: int) -> list[tuple[int, Decoded]]:
        """(slot of the first placeholder among the inputs, decoded item) of a row, in the order of the slots."""
        if self.media is None:
            return []
        low = row * self.row_tokens
        starts, first = self.stream.document_starts(low, low + self.row_tokens)
        return self.media.of_documents([(int(start) - low, first + n) for n, start in enumerate(starts)])

    def cut(self, low: int, high: int) -> list[Piece]:
        """The documents between two positions of the stream. A document that crosses one of them is cut there."""
        starts, _ = self.stream.document_starts(low + 1, high)
        bounds = [low, *starts.tolist(), high]
        return [Piece(a, b) for a, b in itertools.pairwise(bounds)]

    def plan(self, rows: list[int], where: list[int], plan: native.Plan) -> list[int]:
        """Add to `plan`, which compiled code runs: read row rows[i] into place where[i] of a batch.

        -> places of the rows that compiled code cannot read: rows in two shards, and the stream's first row, which has no
        token before it. For the order of the numbers see `native.Plan.numbers`.
        """
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
                start = row * size  # TokenStream.entry_with, inlined, because it runs for every row
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
                plan.keep.append(packed)  # keeps its memory alive: the plan has only the address
                numbers.extend((shard.record, start, packed.address, packed.rows, row % STRETCH_ROWS, out))
        return left

    def _unpack(self, stretch: int, packed: Packed, place: int) -> list[Piece]:
        low, after = stretch * STRETCH_ROWS * self.row_tokens, packed.rows + 1
        first, stop = packed.numbers[place : place + 2].tolist()
        places = packed.numbers[after + 2 * first : after + 2 * stop].tolist()
        return [Piece(low + start, low + start + size) for start, size in zip(places[::2], places[1::2], strict=True)]

    def _packed(self, wanted: Sequence[int]) -> dict[int, Packed]:
        """{number: packed stretch}. Stretches that are not cached are packed in one call."""
        found = {number: packed for number in wanted if (packed := self._stretches.get(number)) is not None}
        missing = [number for number in dict.fromkeys(wanted) if number not in found]
        for number, packed in self._pack(missing).items() if missing else ():
            found[number] = self._stretches.keep(number, packed)
        return found

    def _pack(self, stretches: Sequence[int]) -> dict[int, Packed]:
        """Pack in compiled code the stretches that are in one entry, and in Python the others. Both give the same pieces."""
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
                # Documents in the stretch, at the entry's average, times two. If it is too low, `native.pack` tries again.
                guess = 2 * len(shard.search) * size // max(1, bounds[entry + 1] - bounds[entry])
                plans.append((number, entry, native.Stretch(shard.record, before + 1, rows, guess)))
        packed = native.pack([plan for *_, plan in plans], row_tokens=self.row_tokens)
        for (number, entry, plan), numbers in zip(plans, packed, strict=True):
            if numbers is not None:
                found[number] = Packed(numbers, native.address_of(numbers), plan.rows, entry, plan.low)
        for number in stretches:
            if number not in found:
                found[number] = self._pack_in_python(number)
        return found

    def _pack_in_python(self, number: int) -> Packed:
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
    rest.sort(key=lambda piece: (piece.start - piece.stop, piece.start))  # longest first, then in the stream's order
    gaps: list[tuple[int, int]] = []  # (room, row), sorted: bisect finds the smallest room that is enough
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
    for room, row in reversed(gaps):  # the unplaced pieces have in total exactly the length of the gaps
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
