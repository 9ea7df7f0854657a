"""Rows that a run leaves out of the order of training, as ranges of its positions.

    order without them   0 1 2 3 4 5 6 7 8 ...        left out: [3, 5)
    a run's positions    0 1 2     3 4 5 6 ...        position 3 is row 5 of the order

A run leaves rows out after it went back from a spike of the loss. Its checkpoints record the ranges, so the row at a position is
a pure function of seed, blend and ranges.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from recipes.schema.checkpoint_steps import ledger_in
from recipes.schema.errors import CheckpointError, DataError


@dataclass(frozen=True)
class LeftOut:
    """Disjoint ranges of the full order, sorted. Make it with `left_out`."""

    ranges: tuple[tuple[int, int], ...] = ()
    """(first row, row after the last) of each range."""

    @property
    def rows(self) -> int:
        """Number of rows left out."""
        return sum(stop - start for start, stop in self.ranges)

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Where a run's positions are in the full order. int64, of any order."""
        positions = np.asarray(positions, dtype=np.int64)
        if not self.ranges:
            return positions
        starts, stops = np.array(self.ranges, dtype=np.int64).T
        before = np.cumsum(stops - starts)
        first_after = starts - (before - (stops - starts))  # the run's position that would be the range's first row
        return positions + np.concatenate(([0], before))[np.searchsorted(first_after, positions, side="right")]

    def place(self, position: int) -> int:
        """`places` of one position."""
        return int(self.places(np.array([position]))[0])

    def position(self, place: int) -> int | None:
        """The run's position of a row of the full order; None if it is left out."""
        passed = 0
        for start, stop in self.ranges:
            if place < start:
                break
            if place < stop:
                return None
            passed += stop - start
        return place - passed

    def plus(self, start: int, stop: int) -> "LeftOut":
        """Also leave out the run's positions start to stop, as they are now."""
        rows = self.places(np.arange(start, stop)).tolist()
        return left_out([*self.ranges, *((row, row + 1) for row in rows)])


def left_out(ranges: Iterable[tuple[int, int]]) -> LeftOut:
    """Ranges in any order, merged where they touch or overlap."""
    merged: list[list[int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        elif start < stop:
            merged.append([start, stop])
    return LeftOut(tuple((start, stop) for start, stop in merged))


def left_out_by_run(run: DictConfig) -> LeftOut:
    """Rows that a run has left out, by its newest checkpoint; none before its first. run: the group of the composed recipe.

    DataError if its folder is unreadable.
    """
    if OmegaConf.is_missing(run, "name"):
        return LeftOut()
    try:
        return left_out(ledger_in(Path(str(run.folder)) / str(run.name)).left_out)
    except CheckpointError as error:
        raise DataError(str(error)) from error
