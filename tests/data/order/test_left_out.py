"""Rows left out: the order without them is the full order with these rows deleted, both ways."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order.blend import Blend, BlendSource
from data.order.left_out import LeftOut, left_out
from recipes.schema.errors import DataError

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1])))


@given(RANGES)
def test_the_order_without_rows_is_the_full_order_with_them_deleted(ranges: list[tuple[int, int]]) -> None:
    without = left_out(ranges)
    gone = {row for start, stop in ranges for row in range(start, stop)}
    kept = [row for row in range(200) if row not in gone]
    assert without.rows == len(gone)
    assert without.places(np.arange(len(kept))).tolist() == kept
    positions = {row: at for at, row in enumerate(kept)}
    assert [without.position(row) for row in range(200)] == [positions.get(row) for row in range(200)]


@given(RANGES, st.integers(0, 40), st.integers(0, 9))
def test_leaving_more_rows_out_counts_positions_of_the_present_order(
    ranges: list[tuple[int, int]], start: int, count: int
) -> None:
    before = left_out(ranges)
    kept = before.places(np.arange(100)).tolist()
    after = before.plus(start, start + count)
    assert after.places(np.arange(100 - count)).tolist() == kept[:start] + kept[start + count :]


def test_a_blend_without_rows_draws_finds_and_ends_accordingly() -> None:
    sources = [BlendSource("a", 0.7, 50, max_epochs=1), BlendSource("b", 0.3, 20)]
    full = Blend(sources, seed=3)
    short = full.without(LeftOut(((4, 9), (12, 13))))
    kept = [row for row in range(40) if row not in {4, 5, 6, 7, 8, 12}]
    expected, found = full.draw(np.array(kept)), short.draw(np.arange(len(kept)))
    assert (expected.source == found.source).all() and (expected.row == found.row).all()
    for position in (0, 4, 9, 20):
        source, row = int(found.source[position]), int(found.row[position])
        assert short.positions_of(source, row, stop=len(kept)) == [position]
    gone = full.draw(np.array([5]))
    assert short.positions_of(int(gone.source[0]), int(gone.row[0]), stop=20) == []
    full.check_length(70)
    with pytest.raises(DataError, match="runs out"):
        short.check_length(70)
