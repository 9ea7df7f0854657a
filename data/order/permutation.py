"""The order of a source's rows: a permutation per epoch that is computed, not stored.

    RowOrder(rows, key).rows_at(index, epoch)    row number `index` of an epoch
                       .index_of(row, epoch)     the inverse

A Feistel network permutes the numbers below a power of four. A value outside 0..rows-1 is permuted again until it is inside
(cycle walking). With groups (the rows of each shard), an epoch reads a few shards at a time, which are a *pool*. The order of
the shards is a permutation, and so is the order of the rows in a pool.
"""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 4
_GOLDEN = 0x9E3779B97F4A7C15
"""Splitmix64's increment: 2**64 divided by the golden ratio."""


class RowOrder:
    """The order of one source's rows in every epoch."""

    def __init__(self, rows: int, *, key: int, groups: Sequence[int] = (), together: int = 0) -> None:
        """groups: number of rows of each shard, in the source's order. together: shards in a pool; 0 for all."""
        self.rows = rows
        self._key = key
        self._together = together
        self._groups = np.asarray(groups, dtype=np.int64) if together and len(groups) > together else None

    def rows_at(self, index: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Rows (int64) at place `index` of epoch `epoch`."""
        if self._groups is None:
            return permute(index, epoch, size=self.rows, key=self._key)
        row = np.empty_like(index)
        for which in np.unique(epoch):
            here = np.flatnonzero(epoch == which)
            order, starts, pools = self._pools(int(which))
            pool_of = np.searchsorted(pools, index[here], side="right") - 1
            for pool in np.unique(pool_of):
                mine = here[pool_of == pool]
                place = self._in_pool(int(pool), index[mine] - pools[pool], epoch[mine], pools)
                slot = np.searchsorted(starts, place, side="right") - 1
                row[mine] = self._first[order[slot]] + place - starts[slot]
        return row

    def index_of(self, row: int, epoch: int) -> int:
        """The place of a row in an epoch."""
        one, at = np.array([row], dtype=np.int64), np.array([epoch], dtype=np.int64)
        if self._groups is None:
            return int(permute(one, at, size=self.rows, key=self._key, back=True)[0])
        order, starts, pools = self._pools(epoch)
        group = int(np.searchsorted(self._first, row, side="right")) - 1
        slot = int(np.flatnonzero(order == group)[0])
        place = int(starts[slot]) + row - int(self._first[group])
        pool = int(np.searchsorted(pools, place, side="right")) - 1
        size, key = self._pool(pool, pools)
        inside = np.array([place - int(pools[pool])], dtype=np.int64)
        return int(pools[pool]) + int(permute(inside, at, size=size, key=key, back=True)[0])

    @property
    def _first(self) -> np.ndarray:
        assert self._groups is not None
        return np.concatenate([[0], np.cumsum(self._groups)[:-1]])

    def _pools(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order of the shards, place of the first row of each shard, place of the first row of each pool) in an epoch."""
        assert self._groups is not None
        count = len(self._groups)
        order = permute(np.arange(count), np.full(count, epoch), size=count, key=self._key ^ _GOLDEN)
        starts = np.concatenate([[0], np.cumsum(self._groups[order])])
        return order, starts[:-1], np.append(starts[:-1][:: self._together], starts[-1])

    def _pool(self, pool: int, pools: np.ndarray) -> tuple[int, int]:
        return int(pools[pool + 1] - pools[pool]), (self._key + _GOLDEN * (pool + 1)) % 2**64

    def _in_pool(self, pool: int, index: np.ndarray, epoch: np.ndarray, pools: np.ndarray) -> np.ndarray:
        size, key = self._pool(pool, pools)
        return pools[pool] + permute(index, epoch, size=size, key=key)


def permute(index: np.ndarray, epoch: np.ndarray, *, size: int, key: int, back: bool = False) -> np.ndarray:
    """A permutation of 0..size-1 for each epoch, evaluated at `index`. Arrays are int64 of equal length. `back` inverts it."""
    if size == 1:
        return np.zeros_like(index)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift, bound = np.uint64((1 << half) - 1), np.uint64(half), np.uint64(size)
    salts = [_mix(epoch.astype(np.uint64) + np.uint64((key + _GOLDEN * r) % 2**64)) for r in range(1, _ROUNDS + 1)]
    value = index.astype(np.uint64)
    walking = np.arange(len(value))
    while len(walking):
        high, low = value[walking] >> shift, value[walking] & mask
        if back:
            for salt in reversed(salts):
                high, low = low ^ (_mix(high + salt[walking]) & mask), high
        else:
            for salt in salts:
                high, low = low, high ^ (_mix(low + salt[walking]) & mask)
        value[walking] = (high << shift) | low
        walking = walking[value[walking] >= bound]
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective scrambling of 64-bit words (the finalizer of splitmix64, Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
