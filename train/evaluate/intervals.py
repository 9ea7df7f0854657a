"""Confidence intervals of the scores that an evaluation reports.

    share of right answers   Wilson's score interval                     (never outside 0 ... 1, right for 0 of n and n of n)
    mean of per-item values  mean +- z s / sqrt(n)                       (normal approximation)
    ratio of two sums        the same for the linearised ratio           (bits per byte: sum of bits / sum of bytes)

The sample is the items: an interval covers the choice of other items of the same kind, not the choice of another training seed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Probability that an interval contains the true value."""
NO_INTERVAL = "none"
"""Method of a score without an interval: low and high are NaN."""


@dataclass(frozen=True)
class Metric:
    """One score with its interval."""

    value: float
    low: float
    high: float
    method: str
    """Method of the interval: `wilson`, `normal` or `normal (ratio)`, always 95 %; or `none`."""
    higher_is_better: bool = True


def share(right: float, count: int) -> Metric:
    """Share of `right` of `count` with Wilson's score interval (E. B. Wilson, JASA 22, 1927; without continuity correction).
    A tie may count as half a right one."""
    assert 0 <= right <= count and count > 0, f"{right} of {count}"
    z2 = _z() ** 2
    p = right / count
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _z() / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count))
    low, high = (0.0 if right == 0 else centre - half), (1.0 if right == count else centre + half)
    return Metric(p, low, high, "wilson")


def mean(values: Sequence[float], *, higher_is_better: bool = True) -> Metric:
    """Mean of per-item values. For a single item the interval is infinite, because the spread is not known."""
    assert values, "a mean of nothing"
    centre = statistics.fmean(values)
    half = _z() * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Metric(centre, centre - half, centre + half, "normal", higher_is_better)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, higher_is_better: bool) -> Metric:
    """Sum of numerators / sum of denominators, with one of each per item. The interval is that of the mean residual x - R y
    (W. G. Cochran, Sampling Techniques, 3rd edition, equation 6.13, without the correction for finite populations)."""
    assert len(numerators) == len(denominators) > 0
    total = math.fsum(denominators)
    assert total > 0, "a ratio to nothing"
    value, count = math.fsum(numerators) / total, len(numerators)
    half = math.inf
    if count > 1:
        squares = math.fsum((x - value * y) ** 2 for x, y in zip(numerators, denominators, strict=True))
        half = _z() * math.sqrt(squares / (count - 1) / count) / (total / count)
    return Metric(value, value - half, value + half, "normal (ratio)", higher_is_better)


def _z() -> float:
    """The two-sided normal quantile: 1.95996 for 95 %."""
    return statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
