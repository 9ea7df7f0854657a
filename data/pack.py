"""Rows out of a stream of documents: concatenate, then cut every `row_tokens` tokens.

Row r of a source covers tokens r S ... r S + S of its stream: S inputs and the S labels one to the right, so every token
but the first is a label exactly once. What is left after the last whole row is not used, and counted.
"""

from dataclasses import dataclass

import numpy as np

from data.shards import Shard


@dataclass(frozen=True)
class Rows:
    """The rows of one shard."""

    shard: Shard
    row_tokens: int

    @property
    def count(self) -> int:
        """Whole rows."""
        return max(0, (len(self.shard.tokens) - 1) // self.row_tokens)

    @property
    def cropped_tokens(self) -> int:
        """Tokens after the last whole row."""
        return len(self.shard.tokens) - (self.count * self.row_tokens + 1 if self.count else 0)

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """[rows, row_tokens + 1] int64: inputs and labels overlap by all but one token."""
        offsets = rows[:, None] * self.row_tokens + np.arange(self.row_tokens + 1)[None, :]
        return self.shard.tokens[offsets].astype(np.int64)

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """[rows, row_tokens] int32: which document of the row each input belongs to, counted from 0."""
        offsets = rows[:, None] * self.row_tokens + np.arange(self.row_tokens)[None, :]
        document = np.searchsorted(self.shard.ends, offsets, side="right")
        return (document - document[:, :1]).astype(np.int32)
