"""The order of training: a pure function of the position, shares exact at every prefix and across phases, rows once an epoch."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.blend import Blend, BlendSource
from data.config import PhaseConfig
from data.curriculum import Curriculum, Phase
from data.errors import DataError
from data.order import RowOrder, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_a_permutation_reaches_each_row_once_and_can_be_turned_back(size: int, key: int, epoch: int) -> None:
    index, at = np.arange(size), np.full(size, epoch)
    rows = permute(index, at, size=size, key=key)
    assert np.array_equal(np.sort(rows), index)
    assert np.array_equal(permute(rows, at, size=size, key=key, back=True), index)


def test_permutations_differ_by_epoch_and_mix_well() -> None:
    index = np.arange(10_000)
    first, second = (permute(index, np.full(10_000, e), size=10_000, key=7) for e in (0, 1))
    assert (first == second).mean() < 0.01
    # A uniform permutation moves a row by a third of the range on average.
    assert abs(np.abs(first - index).mean() / 10_000 - 1 / 3) < 0.02


@settings(deadline=None, max_examples=40)
@given(
    groups=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    together=st.integers(1, 4),
    epoch=st.integers(0, 5),
    key=st.integers(0, 2**64 - 1),
)
def test_rows_shuffled_by_shards_come_once_and_from_few_shards_at_a_time(
    groups: list[int], together: int, epoch: int, key: int
) -> None:
    total = sum(groups)
    order = RowOrder(total, key=key, groups=groups, together=together)
    rows = order.rows_at(np.arange(total), np.full(total, epoch))
    assert sorted(rows) == list(range(total))
    assert all(order.index_of(int(row), epoch) == index for index, row in enumerate(rows))
    shard = np.repeat(np.arange(len(groups)), groups)[rows]
    open_at = [(np.flatnonzero(shard == s)[0], np.flatnonzero(shard == s)[-1]) for s in range(len(groups))]
    assert all(sum(lo <= at <= hi for lo, hi in open_at) <= together for at in range(total))


@st.composite
def shares(draw: st.DrawFn, sources: int) -> tuple[Fraction, ...]:
    numbers = draw(st.lists(st.integers(0, 60), min_size=sources, max_size=sources).filter(any))
    return tuple(Fraction(n, sum(numbers)) for n in numbers)


@st.composite
def curricula(draw: st.DrawFn) -> list[Phase]:
    sources = draw(st.integers(1, 6))
    phases, at = [Phase(0, draw(shares(sources)))], 0
    for _ in range(draw(st.integers(0, 3))):
        at += draw(st.integers(1, 400))
        ramp = draw(st.sampled_from([0, 1, 50, 300]))
        phases.append(Phase(at, draw(shares(sources)), ramp))
        at += ramp
    return phases


def owed_by_sum(phases: list[Phase], rows: int) -> np.ndarray:
    """What each source is owed after every prefix, from the definition: shares at the middle of each row, summed up."""
    total, prefixes = [Fraction(0)] * len(phases[0].shares), []
    for row in range(rows):
        number = max(i for i, phase in enumerate(phases) if phase.start <= row)
        phase, now = phases[number], phases[number].shares
        if row < phase.start + phase.ramp:
            done = (row - phase.start + Fraction(1, 2)) / phase.ramp
            old = phases[number - 1].shares
            now = tuple(a + (b - a) * done for a, b in zip(old, phase.shares, strict=True))
        total = [t + n for t, n in zip(total, now, strict=True)]
        prefixes.append([float(t) for t in total])
    return np.array(prefixes)


@settings(deadline=None, max_examples=60)
@given(phases=curricula())
def test_shares_are_within_one_row_at_every_prefix_across_phases_and_ramps(phases: list[Phase]) -> None:
    curriculum, rows = Curriculum(phases), phases[-1].start + phases[-1].ramp + 300
    sources, at, bound = [], 0, 0.0
    while at < rows:
        window = curriculum.window(at)
        assert window.start == at
        assert np.array_equal(window.drawn, np.bincount(np.array(sources, dtype=int), minlength=len(window.drawn)))
        sources += window.source.tolist()
        at, bound = window.stop, max(bound, window.within)
    drawn = np.eye(len(phases[0].shares))[sources[:rows]].cumsum(axis=0)
    error = np.abs(drawn - owed_by_sum(phases, rows)).max()
    assert error <= bound + 1e-6 and bound <= 1.5
    if len(phases) == 1:
        assert bound == 1


def test_the_promise_of_one_row_is_rarely_missed_with_many_sources_phases_and_ramps() -> None:
    """Bounds of the windows of 120 random curricula of up to 12 sources: all but a few in a thousand are one row."""
    rng = np.random.default_rng(0)
    within: list[float] = []
    for _ in range(40):
        sources, at = int(rng.integers(4, 13)), 0
        phases = []
        for number in range(3):
            parts = rng.choice([0, 1, 2, 5, 50, 200], sources) + (np.arange(sources) == 0)
            ramp = int(rng.choice([0, 3000])) if number else 0
            phases.append(Phase(at, tuple(Fraction(int(p), int(parts.sum())) for p in parts), ramp))
            at += ramp + int(rng.integers(100, 9000))
        curriculum, place = Curriculum(phases), 0
        while place < at:
            window = curriculum.window(place)
            within.append(window.within)
            place = window.stop
    assert max(within) <= 1.5
    assert np.mean(np.array(within) == 1) > 0.98


def blend_of(weights: list[float], rows: list[int], **changes: object) -> Blend:
    sources = [BlendSource(f"s{i}", w, n) for i, (w, n) in enumerate(zip(weights, rows, strict=True))]
    return Blend(sources, seed=3, **changes)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=3), start=st.integers(0, 10**13))
def test_each_row_comes_once_an_epoch_and_far_positions_are_like_near_ones(rows: list[int], start: int) -> None:
    blend = blend_of([1.0] * len(rows), rows)
    draw = blend.draw(np.arange(3 * max(rows) * len(rows)))
    for source, count in enumerate(rows):
        mine = draw.source == source
        for epoch in range(int(draw.epoch[mine].max())):
            assert sorted(draw.row[mine & (draw.epoch == epoch)]) == list(range(count))
    far = start + np.arange(2 * len(rows))
    whole = blend.draw(far)
    assert np.array_equal(np.bincount(whole.source, minlength=len(rows)), np.full(len(rows), 2))
    shuffled = np.random.default_rng(0).permutation(len(far))
    assert np.array_equal(blend.draw(far[shuffled]).row, whole.row[shuffled])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), together=st.sampled_from([0, 2]))
def test_a_row_is_found_at_every_position_it_lies_at(seed: int, together: int) -> None:
    sources = [BlendSource("a", 0.7, 31, groups=(7, 10, 14)), BlendSource("b", 0.3, 17)]
    phases = [PhaseConfig(from_tokens=120, weights={"a": 1, "b": 3}, ramp_tokens=60)]
    blend = Blend(sources, seed=seed, phases=phases, shuffle_shards=together)
    draw = blend.draw(np.arange(400))
    for source, row in ((0, 5), (1, 16)):
        assert (
            blend.positions_of(source, row, stop=400)
            == np.flatnonzero((draw.source == source) & (draw.row == row)).tolist()
        )


def test_ten_trillion_tokens_with_phases_and_a_ramp_open_at_once() -> None:
    """Nemotron Nano 2's phase switches (60 % and 90 % of 20T tokens), 2.4 billion rows of 8,192."""
    weights = [0.5, 0.2, 0.15, 0.1, 0.05]
    total = 20 * 10**12
    phases = [
        PhaseConfig(total * 6 // 10, dict(zip("abcde", (3, 3, 2, 1, 1), strict=True)), ramp_tokens=total // 100),
        PhaseConfig(total * 9 // 10, dict(zip("abcde", (1, 4, 2, 2, 3), strict=True))),
    ]
    sources = [BlendSource(n, w, 250_000_000) for n, w in zip("abcde", weights, strict=True)]
    began = time.perf_counter()
    blend = Blend(sources, seed=1, row_tokens=8192, phases=phases)
    for position in (0, total * 61 // 100 // 8192, total // 8192 - 1):
        blend.draw(np.array([position]))
    assert time.perf_counter() - began < 0.5
    error = blend.curriculum.drawn(2_000_000_000) - np.array([float(o) for o in blend.curriculum.owed(2_000_000_000)])
    assert np.abs(error).max() <= 1


def test_a_cap_on_repeats_is_known_before_training_and_kept() -> None:
    blend = Blend([BlendSource("a", 0.5, 100, max_epochs=2), BlendSource("b", 0.5, 1000)], seed=0)
    blend.check_length(400)
    with pytest.raises(DataError, match=r"201 of source 'a', which has 100: 2.01 epochs, more than max_epochs=2"):
        blend.check_length(402)
    with pytest.raises(DataError, match="'a' has been read max_epochs=2 times at position 40"):
        blend.draw(np.arange(396, 410))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([PhaseConfig(100, {"s9": 1.0})], r"data.phases\[0\].weights names s9; data.sources has s0, s1"),
        ([PhaseConfig(100, {"s0": 0.0})], r"phases\[0\].weights: all weights are 0"),
        (
            [PhaseConfig(100, {"s0": 1}, ramp_tokens=50), PhaseConfig(140, {"s1": 1})],
            "before the end of the phase before",
        ),
    ],
)
def test_phases_that_cannot_be_meant_are_refused(phases: list[PhaseConfig], message: str) -> None:
    with pytest.raises(DataError, match=message):
        blend_of([1.0, 2.0], [50, 50], phases=phases)
