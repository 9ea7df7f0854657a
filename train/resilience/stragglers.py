"""Finds ranks that compute more slowly than the ranks that do the same work.

All ranks end a step together, because they wait for each other: a slow one shows only in the time until its gradients are
complete, before they are summed over the data-parallel ranks. Ranks of one pipeline stage do the same work, so each is compared
with the median of the others in the same step: a pause of the whole machine slows all of them and cancels out. Ranks that share
a model (tensor, pipeline, context) wait for each other in that time too, so all ranks of a slow replica may be named.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 20
"""Steps of which the median counts: pauses of single steps (saves, other programs) do not."""
SLOWER = 1.1
"""A rank is slow if the median of its ratios to the others exceeds this factor,"""
SIGMAS = 4.0
"""and by this many standard errors, in two windows in a row: 40 steps. Normal noise exceeds it in one of 10^9."""
_NORMAL_MAD = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""
_NORMAL_MEDIAN = 1.2533
"""Standard error of the median over that of the mean, of a normal distribution: sqrt(pi / 2)."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that is slower than its stage."""

    rank: int
    factor: float

    def __str__(self) -> str:
        return f"rank {self.rank} computes {self.factor - 1:.0%} longer than the other ranks with the same work"


class Stragglers:
    """Compares the ranks of each stage, window by window; the same on every rank."""

    def __init__(self, stages: Sequence[Sequence[int]]) -> None:
        """stages: ranks that do the same work."""
        self._stages = stages
        self._were_slow: set[int] = set()
        self._named: set[int] = set()

    def window(self, seconds: Sequence[Sequence[float]]) -> list[SlowRank]:
        """Look at one more window. seconds: positive times of its steps, of all ranks in order. -> ranks that are named now; one
        that recovers can be named again."""
        excess: dict[int, float] = {}
        slow = set()
        for stage in self._stages:
            if len(stage) < 2:
                continue
            logs = np.log(np.array([seconds[rank] for rank in stage]))
            ratios = logs - _median_of_others(logs)
            middle = np.median(ratios, axis=1)
            deviation = _NORMAL_MAD * np.median(np.abs(ratios - middle[:, None]), axis=1)
            error = _NORMAL_MEDIAN * deviation / math.sqrt(logs.shape[1])
            for rank, factor, limit in zip(stage, middle, np.maximum(math.log(SLOWER), SIGMAS * error), strict=True):
                excess[rank] = float(factor)
                if factor > limit:
                    slow.add(rank)
        twice = slow & self._were_slow
        found = [SlowRank(rank, math.exp(excess[rank])) for rank in sorted(twice - self._named)]
        self._were_slow, self._named = slow, (self._named & slow) | twice
        return found


def _median_of_others(logs: np.ndarray) -> np.ndarray:
    """logs: [ranks, steps]. -> the same shape: the median, in each step, of all ranks but this one."""
    ordered = np.sort(logs, axis=0)
    place = np.argsort(np.argsort(logs, axis=0), axis=0)
    others = len(logs) - 1

    def of_others(index: int) -> np.ndarray:
        return np.where(place > index, ordered[index], ordered[index + 1])

    return (of_others((others - 1) // 2) + of_others(others // 2)) / 2
