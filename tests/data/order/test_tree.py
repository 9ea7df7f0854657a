"""Shares of one heavy and many light sources, counted row by row against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

from data.order.curriculum import Curriculum
from data.order.shares import Phase


def off_in_window(curriculum: Curriculum, at: int) -> tuple[float, int]:
    """(most that a source is off after any row of the window that starts at `at`, where the next one starts), by counting."""
    window = curriculum.window(at)
    assert window.start == at
    (segment,) = {curriculum._segment_of(at), curriculum._segment_of(window.stop - 1)}
    part = curriculum.segments[segment]
    drawn = np.cumsum(window.source[:, None] == np.arange(len(window.drawn)), axis=0)
    assert (np.take_along_axis(drawn, window.source[:, None].astype(int), axis=1)[:, 0] - 1 == window.earlier).all()
    ahead = np.array([float(o - d) for o, d in zip(part.owed_at(at), window.drawn.tolist(), strict=True)])
    owed = ahead + np.array([float(s) for s in part.shares]) * np.arange(1, len(drawn) + 1)[:, None]
    assert (curriculum.window(window.stop).drawn == window.drawn + drawn[-1]).all()
    return float(np.abs(drawn - owed).max()), window.stop


@pytest.mark.parametrize("light", ["0.0001234567", "0.0000317"])
@pytest.mark.parametrize("count", [3, 11, 200])
def test_one_heavy_and_many_light_sources_keep_within_one_row_at_every_prefix(count: int, light: str) -> None:
    """All light sources are owed half a row at the same place."""
    share = Fraction(light)
    curriculum = Curriculum([Phase(0, (1 - count * share, *[share] * count))])
    at = 0
    while at < 12_000:
        off, at = off_in_window(curriculum, at)
        assert off < 1
    assert curriculum.window(10**12).start <= 10**12  # anywhere, at once


def test_a_thousand_sources_keep_what_their_tree_says() -> None:
    weights = [Fraction(int(w)) for w in np.random.default_rng(5).integers(1, 10**6, 1000)]
    weights.append(sum(weights) * 3)
    curriculum = Curriculum([Phase(0, tuple(w / sum(weights) for w in weights))])
    bound = curriculum.window(0).within
    assert bound < 1.6
    for start in (0, 4096, 10**9 // 4096 * 4096):
        off = off_in_window(curriculum, start)[0]
        assert off <= bound


def test_a_change_of_shares_among_many_sources_is_made_up() -> None:
    light, other = Fraction("0.0007001"), Fraction("0.0011003")
    phases = [Phase(0, (1 - 20 * light, *[light] * 20)), Phase(5000, (1 - 20 * other, *[other] * 20))]
    curriculum = Curriculum(phases)
    at = 0
    for most in (1.1, 2, 1.1, 1.1):  # the second window begins with the change
        off, at = off_in_window(curriculum, at)
        assert off < most
