"""Whole chats into rows: none is cut, and every row is filled up with tokens that are not learned.

The answers of a preference are packed like one chat: they are neighbours in one row. A record of media is packed like a chat.

    chats, in the order of their records --best fit, a stretch at a time--> rows of exactly `row_tokens`, one after the other

A chat that is cut would leave answers without their questions. So rows are made when the data is prepared, and a reader's rows of
the plain order are these rows. What fills a row up counts to its last chat. A row of a stretch that is less than 90 % full waits
for the chats of the next.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

_STRETCH_ROWS = 64
_FULL = 0.9


@dataclass(frozen=True)
class MarkedDocument:
    """A document of which some tokens are learned, as it is stored: it ends with the end-of-document token."""

    ids: np.ndarray
    """int64 [tokens]"""
    learned: np.ndarray
    """bool [tokens]"""
    text_bytes: int


@dataclass
class RowPacker[Label, Document: MarkedDocument]:
    """Arranges chats, or records of media, in rows. What comes out depends on what goes in, in its order, only.

    Label: what is known of a chat besides its tokens, such as where it came from.
    """

    row_tokens: int
    eod: int
    is_single: bool
    """Each chat in a row of its own."""
    padding: int = 0
    """Tokens that rows were filled up with."""
    _waiting: list[tuple[Label, tuple[Document, ...]]] = field(default_factory=list)
    _tokens: int = 0

    def add(self, label: Label, *documents: Document) -> Iterator[tuple[Label, Document]]:
        """Take one chat, or all answers of one preference; give the chats of the rows that are finished, each row's last filled
        up."""
        if self.is_single:
            yield from self._row([(label, documents)])
            return
        self._waiting.append((label, documents))
        self._tokens += _tokens_of(documents)
        if self._tokens >= _STRETCH_ROWS * self.row_tokens:
            yield from self._arrange(is_last=False)

    def finish(self) -> Iterator[tuple[Label, Document]]:
        """The chats of all rows that are left."""
        yield from self._arrange(is_last=True)

    def _arrange(self, *, is_last: bool) -> Iterator[tuple[Label, Document]]:
        waiting, self._waiting, self._tokens = self._waiting, [], 0
        rows = best_fit_whole([_tokens_of(documents) for _, documents in waiting], row_tokens=self.row_tokens)
        fill = [sum(_tokens_of(waiting[place][1]) for place in row) for row in rows]
        is_any_full = any(tokens >= _FULL * self.row_tokens for tokens in fill)
        left: list[int] = []
        for row, tokens in zip(rows, fill, strict=True):
            if is_last or not is_any_full or tokens >= _FULL * self.row_tokens:
                yield from self._row([waiting[place] for place in row])
            else:
                left += row
        self._waiting = [waiting[place] for place in sorted(left)]
        self._tokens = sum(_tokens_of(documents) for _, documents in self._waiting)

    def _row(self, packed: list[tuple[Label, tuple[Document, ...]]]) -> Iterator[tuple[Label, Document]]:
        chats = [(label, document) for label, documents in packed for document in documents]
        yield from chats[:-1]
        label, last = chats[-1]
        missing = self.row_tokens - sum(len(document.ids) for _, document in chats)
        assert missing >= 0, "a chat longer than a row is never added"
        self.padding += missing
        ids = np.concatenate([last.ids, np.full(missing, self.eod, dtype=last.ids.dtype)])
        yield label, replace(last, ids=ids, learned=np.concatenate([last.learned, np.zeros(missing, dtype=bool)]))


def _tokens_of(documents: Sequence[MarkedDocument]) -> int:
    return sum(len(document.ids) for document in documents)


def best_fit_whole(sizes: list[int], *, row_tokens: int) -> list[list[int]]:
    """Places of chats of these sizes by row: the longest first, each in the row with the least room that it fits in, or in a new
    row. Rows in the order of their first chat, and chats in a row too."""
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    rows: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        at = bisect.bisect_left(room, (sizes[place], -1))
        if at == len(room):
            row, left = len(rows), row_tokens
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(place)
        if left > sizes[place]:
            bisect.insort(room, (left - sizes[place], row))
    return sorted(map(sorted, rows))
