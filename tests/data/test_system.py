"""Shared helpers: a cache of the last used values, waits before a retry, numbers with units."""

import pytest

from data.system.recent import Recent
from data.system.retry import wait_s
from recipes.schema import units


def test_what_was_unused_for_longest_goes_first() -> None:
    kept: Recent[str, int] = Recent(most=2)
    for name, value in (("a", 1), ("b", 2)):
        assert kept.get(name) is None and kept.keep(name, value) == value
    assert kept.get("a") == 1
    kept.keep("c", 3)
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (1, None, 3)


def test_the_weight_of_a_cache_is_the_sum_over_its_entries() -> None:
    kept: Recent[int, str] = Recent(most_weight=5, weigh=len)
    kept.keep(0, "abc")
    assert kept.keep(0, "other") == "abc" and kept.weight == 3, "the first value stays"
    kept.keep(1, "de")
    assert kept.weight == 5
    kept.keep(2, "f")
    assert kept.get(0) is None and kept.weight == 3
    kept.drop(1, "another")
    assert kept.get(1) == "de"
    kept.drop(1, "de")
    assert kept.get(1) is None and kept.weight == 1
    kept.keep(3, "longer than all room")
    assert kept.get(3) is not None and kept.get(2) is None, (
        "the newest entry stays, even if it is larger than the limit"
    )


@pytest.mark.parametrize(("failures", "seconds"), [(0, 0), (1, 10), (2, 20), (3, 40), (6, 300), (60, 300)])
def test_waits_double_up_to_the_most(failures: int, seconds: float) -> None:
    assert wait_s(failures, first_s=10, most_s=300) == seconds


def test_numbers_with_units_have_three_digits_and_the_right_unit() -> None:
    bytes_of = (0, 999, 999.6, 4_200_000, 79_640_000_000, 999_600_000, 1e12, 5e15)
    assert [units.size(count) for count in bytes_of] == [
        "0 B", "999 B", "1.00 KB", "4.20 MB", "79.6 GB", "1.00 GB", "1.00 TB", "5,000 TB",
    ]  # fmt: skip
    assert [units.gib(count * 2**30) for count in (0.5, 79.64, 1024)] == ["0.50 GiB", "79.6 GiB", "1,024 GiB"]


def test_spans_and_clocks() -> None:
    assert [units.span(s) for s in (8, 750, 11_160, 216_000)] == ["8.0 s", "12.5 min", "3.1 h", "2.5 days"]
    assert [units.clock(s) for s in (7.4, 3_599.6, 183_845)] == ["0:00:07", "1:00:00", "2 d 3:04:05"]
