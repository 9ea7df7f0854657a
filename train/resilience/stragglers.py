"""Finds ranks that compute more slowly than the ranks that do the same work.

All ranks end a step together, because they wait for each other: a slow one shows only in the time until its gradients are
complete, before they are summed over the data-parallel ranks. Ranks of one pipeline stage do the same work, so each is compared
with the median of the faster half of its stage. Ranks that share a model (tensor, pipeline, context) wait for each other in that
time too, so all ranks of a slow replica may be named.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 20
"""Steps of which the median counts: pauses of single steps (saves, other programs) do not."""
SLOWER = 1.1
"""A rank is slow if its median exceeds its stage's by this factor,"""
SIGMAS = 4.0
"""and by this many standard errors, in two windows in a row: 40 steps. Normal noise exceeds it in one of 10^9."""
_NORMAL_MAD = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""
_NORMAL_MEDIAN = 1.2533
"""Standard error of the median over that of the mean, of a normal distribution: sqrt(pi / 2)."""


@dataclass(frozen=True)
class Typical:
    """A rank's steps in a window, by their logarithms: a factor is a difference."""

    log_s: float
    """Logarithm of the median."""
    error: float
    """Standard error of `log_s`, from the spread of the steps."""


def typical(seconds: Sequence[float]) -> Typical:
    """The median of positive times and its standard error."""
    logs = [math.log(one) for one in seconds]
    middle = statistics.median(logs)
    deviation = statistics.median(abs(one - middle) for one in logs)
    return Typical(middle, _NORMAL_MEDIAN * _NORMAL_MAD * deviation / math.sqrt(len(logs)))


@dataclass(frozen=True)
class SlowRank:
    """A rank that is slower than its stage."""

    rank: int
    factor: float

    def __str__(self) -> str:
        return f"rank {self.rank} computes {self.factor - 1:.0%} longer than the faster half of the ranks with the same work"


class Stragglers:
    """Compares the ranks of each stage, window by window; the same on every rank."""

    def __init__(self, stages: Sequence[Sequence[int]]) -> None:
        """stages: ranks that do the same work."""
        self._stages = stages
        self._were_slow: set[int] = set()
        self._named: set[int] = set()

    def window(self, ranks: Sequence[Typical]) -> list[SlowRank]:
        """Look at one more window of all ranks, in order. -> ranks that are named now; one that recovers can be named again."""
        excess: dict[int, float] = {}
        slow = set()
        for stage in self._stages:
            ordered = sorted((ranks[rank] for rank in stage), key=lambda one: one.log_s)
            half = ordered[: (len(ordered) + 1) // 2]
            usual = statistics.median(one.log_s for one in half)
            error = statistics.median(one.error for one in half)
            for rank in stage:
                excess[rank] = ranks[rank].log_s - usual
                if excess[rank] > max(math.log(SLOWER), SIGMAS * math.hypot(error, ranks[rank].error)):
                    slow.add(rank)
        twice = slow & self._were_slow
        found = [SlowRank(rank, math.exp(excess[rank])) for rank in sorted(twice - self._named)]
        self._were_slow, self._named = slow, (self._named & slow) | twice
        return found
