"""Rows out of a stream of documents: concatenate, then cut every `row_tokens` tokens.

Row r of a source covers tokens r S ... r S + S of its stream: S inputs and the S labels one to the right, so every token
but the first is a label exactly once. What is left after the last whole row is not used, and counted.
"""

from collections.abc import Sequence

import numpy as np

from data.shards import Shard


class Rows:
    """The rows of a source's shards, taken as one stream: a row may begin in one shard and end in the next."""

    def __init__(self, shards: Sequence[Shard], row_tokens: int) -> None:
        self.shards = list(shards)
        self.row_tokens = row_tokens
        self._starts = np.concatenate([[0], np.cumsum([len(shard.tokens) for shard in shards], dtype=np.int64)])
        self.total_tokens = int(self._starts[-1])

    @property
    def count(self) -> int:
        """Whole rows."""
        return max(0, (self.total_tokens - 1) // self.row_tokens)

    @property
    def cropped_tokens(self) -> int:
        """Tokens after the last whole row."""
        return self.total_tokens - (self.count * self.row_tokens + 1 if self.count else 0)

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """[rows, row_tokens + 1] int64: inputs and labels overlap by all but one token."""
        offsets = rows[:, None] * self.row_tokens + np.arange(self.row_tokens + 1)[None, :]
        out = np.empty(offsets.shape, dtype=np.int64)
        for shard, start, here in self._parts(offsets):
            out[here] = shard.tokens[offsets[here] - start]
        return out

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """[rows, row_tokens] int32: which document of the row each input belongs to, counted from 0."""
        offsets = rows[:, None] * self.row_tokens + np.arange(self.row_tokens)[None, :]
        document = np.empty(offsets.shape, dtype=np.int64)
        before = np.concatenate([[0], np.cumsum([len(shard.ends) for shard in self.shards], dtype=np.int64)])
        for index, (shard, start, here) in self._numbered(offsets):
            document[here] = before[index] + np.searchsorted(shard.ends, offsets[here] - start, side="right")
        return (document - document[:, :1]).astype(np.int32)

    def _parts(self, offsets: np.ndarray) -> list[tuple[Shard, int, np.ndarray]]:
        return [part for _, part in self._numbered(offsets)]

    def _numbered(self, offsets: np.ndarray) -> list[tuple[int, tuple[Shard, int, np.ndarray]]]:
        """Per shard that some offsets fall into: its number, and itself, its start in the stream, and which offsets."""
        which = np.searchsorted(self._starts, offsets, side="right") - 1
        return [(int(i), (self.shards[i], int(self._starts[i]), which == i)) for i in np.unique(which)]
