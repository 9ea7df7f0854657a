"""Confidence intervals against published values and exact arithmetic."""

import math

import pytest

from train.evaluate.intervals import mean, ratio, share


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_the_published_score_intervals(right: int, count: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (Wilson's, without continuity correction)."""
    found = share(right, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high) and found.value == right / count


def test_shares_stay_within_0_and_1_and_mirror() -> None:
    for count in (1, 2, 7, 1000):
        assert share(0, count).low == 0.0 and share(count, count).high == 1.0
        for right in range(count + 1):
            one, other = share(right, count), share(count - right, count)
            assert 0 <= one.low <= one.value <= one.high <= 1
            assert math.isclose(one.low, 1 - other.high, abs_tol=1e-12)


def test_means_of_1_to_9_by_hand() -> None:
    """Standard deviation sqrt(60 / 8), so the half width is 1.959964 sqrt(7.5 / 9) = 1.789193."""
    found = mean([float(x) for x in range(1, 10)])
    assert found.value == 5 and math.isclose(found.high - 5, 1.959963984540054 * math.sqrt(7.5 / 9), rel_tol=1e-12)
    assert mean([3.0]).high == math.inf and mean([2.0, 2.0]).low == 2


def test_ratios_of_equal_denominators_are_means() -> None:
    values = [0.5, 2.0, 3.5, 4.0]
    one, other = ratio([7 * x for x in values], [7.0] * 4, higher_is_better=False), mean(values)
    assert math.isclose(one.value, other.value) and math.isclose(one.low, other.low)
    # By hand: R = 6 / 5, residuals 1 - 1.2 * 1 and 5 - 1.2 * 4, s^2 = 0.04 + 0.04, mean denominator 2.5.
    by_hand = 1.959963984540054 * math.sqrt(0.08 / 2) / 2.5
    assert math.isclose(ratio([1, 5], [1, 4], higher_is_better=False).high - 1.2, by_hand, rel_tol=1e-9)
