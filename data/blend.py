"""The order of training: global row position -> (source, row of that source), a pure function with nothing to save.

Two independent parts:

*Which source.* The weights are brought to whole numbers c_i with sum M, and one period of M positions is laid out so
that after every position p each source has been drawn within one row of p c_i / M times (Tijdeman's solution of the
chairman assignment problem, Discrete Mathematics 32, 1980). Positions beyond M repeat the period. Start-up and memory
depend on M (at most 65,536), not on the corpus.

*Which row.* The k-th draw from a source of n rows is row permute(k mod n) of epoch k // n, with a permutation computed
per number (a Feistel network walked until it lands below n), keyed by (seed, source, epoch): no index array.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.errors import DataError

MAX_PERIOD = 1 << 16
ROUNDED_PERIOD = 1 << 12
"""Weights whose exact common denominator is above MAX_PERIOD are rounded to parts of this."""


@dataclass(frozen=True)
class Draw:
    """What lies at some positions, arrays of equal length."""

    source: np.ndarray
    """Index of the source."""
    row: np.ndarray
    """Row of that source, below its row count."""
    epoch: np.ndarray
    """How many times the source had been read through before."""


class Blend:
    """The order of rows of a weighted set of sources. Holds one period; see the module text."""

    def __init__(self, names: Sequence[str], weights: Sequence[float], rows: Sequence[int], *, seed: int) -> None:
        """rows: training rows of each source, at least 1. DataError for a source without rows."""
        for name, count in zip(names, rows, strict=True):
            if count < 1:
                raise DataError(
                    f"source {name!r} is shorter than one row. Give it more text, or lower data.row_tokens."
                )
        self.rows = np.asarray(rows, dtype=np.int64)
        counts = whole_weights(weights)
        self.period = int(sum(counts))
        self.per_period = np.asarray(counts, dtype=np.int64)
        self._source = _layout(counts)
        drawn = np.zeros(len(counts), dtype=np.int64)
        self._order = np.empty(self.period, dtype=np.int64)  # how often this source was drawn before in the period
        for place, source in enumerate(self._source):
            self._order[place] = drawn[source]
            drawn[source] += 1
        self._keys = [_key(seed, name) for name in names]

    def draw(self, positions: np.ndarray) -> Draw:
        """What lies at `positions` (int64, any order). Depends on nothing else."""
        positions = np.asarray(positions, dtype=np.int64)
        periods, place = np.divmod(positions, self.period)
        source = self._source[place]
        nth = periods * self.per_period[source] + self._order[place]
        epoch, index = np.divmod(nth, self.rows[source])
        row = np.empty_like(index)
        for which in np.unique(source):
            here = source == which
            row[here] = permute(index[here], epoch[here], size=int(self.rows[which]), key=self._keys[which])
        return Draw(source=source, row=row, epoch=epoch)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights` (read as the decimals they print as), as small as possible.

    Where that needs a sum above MAX_PERIOD, the nearest numbers with sum ROUNDED_PERIOD (largest remainders first).
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(f.denominator for f in exact))
    numbers = [int(f * scale) for f in exact]
    divisor = math.gcd(*numbers)
    numbers = [n // divisor for n in numbers]
    if sum(numbers) <= MAX_PERIOD:
        return numbers
    total = sum(exact)
    shares = [f / total * ROUNDED_PERIOD for f in exact]
    floors = [max(1, math.floor(s)) for s in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (math.floor(shares[i]) - shares[i], i))
    for index in by_remainder[: max(0, ROUNDED_PERIOD - sum(floors))]:
        floors[index] += 1
    return floors


def permute(index: np.ndarray, epoch: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """A permutation of 0..size-1 for each epoch, evaluated at `index` (int64 arrays of equal length)."""
    if size == 1:
        return np.zeros_like(index)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    rounds = [_mix(epoch.astype(np.uint64) + np.uint64((key + 0x9E3779B97F4A7C15 * r) % 2**64)) for r in range(1, 5)]
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():  # the network permutes a power of four; walk on until back inside
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for salt in rounds:
            left, right = right, left ^ (_mix(right + salt[outside]) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside &= value >= np.uint64(size)
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective scrambling of 64-bit words (the finalizer of splitmix64, Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def _layout(counts: Sequence[int]) -> np.ndarray:
    """One period in Tijdeman's order: at each position, of the sources that are due, the one due soonest."""
    period, sources = sum(counts), len(counts)
    if sources == 1:
        return np.zeros(period, dtype=np.int64)
    slack = Fraction(1, 2 * sources - 2)
    # Everything times period * (2 sources - 2), so that whole numbers suffice.
    unit = slack.denominator
    drawn = [0] * sources
    order = np.empty(period, dtype=np.int64)
    for position in range(1, period + 1):
        best, best_due = -1, Fraction(0)
        for source in range(sources):
            lead = counts[source] * position - drawn[source] * period  # share owed, times period
            if lead * unit >= period:
                due = Fraction(period * (unit - 1) - lead * unit, counts[source])
                if best < 0 or due < best_due:
                    best, best_due = source, due
        assert best >= 0, "some source is always due"
        order[position - 1] = best
        drawn[best] += 1
    return order
