"""The order of training: a pure function of the position, shares exact at every prefix and across phases, rows once an epoch."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.blend import Blend, BlendSource
from data.order.curriculum import Curriculum
from data.order.permutation import RowOrder, permute
from data.order.shares import Phase
from recipes.schema.data import PhaseConfig
from recipes.schema.errors import DataError


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


@settings(max_examples=40)
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


@settings(max_examples=60)
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


def test_shares_stay_within_one_row_with_many_sources_phases_and_ramps() -> None:
    """Windows of 40 random curricula of up to 12 sources. Not proven for all there are (data/order/curriculum.py says why)."""
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
    assert len(within) > 150 and set(within) == {1.0}


def owed_with_limits(phases: list[Phase], limits: list[int | None], rows: int) -> list[list[Fraction]]:
    """What each source is owed after every prefix, row by row; shorter if nothing is left to draw."""
    sources = len(limits)
    gone: set[int] = set()

    def left(shares: list[Fraction]) -> list[Fraction]:
        kept = [Fraction(0) if i in gone else s for i, s in enumerate(shares)]
        return [s / sum(kept) for s in kept] if sum(kept) else kept

    total, prefixes = [Fraction(0)] * sources, [[Fraction(0)] * sources]
    for row in range(rows):
        for number, phase in enumerate(phases):
            if row == phase.start and phase.ramp:
                begin, first, target, end = row, list(phases[number - 1].shares), list(phase.shares), row + phase.ramp
            elif row == phase.start + phase.ramp:
                begin, first, target, end = row, list(phase.shares), list(phase.shares), row + 10**9
        while True:
            a, b = left(first), left(target)
            if not sum(b):
                return prefixes
            a = a if sum(a) else b
            at = [[x + (y - x) * Fraction(q) / (end - begin) for x, y in zip(a, b, strict=True)]
                  for q in (row - begin, row - begin + Fraction(1, 2))]  # fmt: skip
            after = [t + s for t, s in zip(total, at[1], strict=True)]
            out = [i for i, most in enumerate(limits) if most is not None and i not in gone and after[i] > most]
            if not out:
                break
            gone.add(out[0])
            begin, first = row, at[0]
        total = after
        prefixes.append(total)
    return prefixes


@settings(max_examples=60)
@given(phases=curricula(), data=st.data())
def test_sources_that_run_out_leave_their_part_to_the_others_within_one_row(
    phases: list[Phase], data: st.DataObject
) -> None:
    sources, rows = len(phases[0].shares), phases[-1].start + phases[-1].ramp + 150
    limits = data.draw(st.lists(st.none() | st.integers(1, 200), min_size=sources, max_size=sources))
    owed = owed_with_limits(phases, limits, rows)
    curriculum = Curriculum(phases, limits)
    stop = len(owed) - 1
    assert curriculum.stop == stop if stop < rows else curriculum.stop is None or curriculum.stop >= rows
    for place in {0, 1, stop // 3, stop // 2, stop - 1} & set(range(stop)):
        assert list(curriculum.owed(place)) == owed[place]
    order, within = [], 0.0
    while len(order) < stop:
        window = curriculum.window(len(order))
        assert window.start == len(order) and np.array_equal(window.drawn, np.bincount(order, minlength=sources))
        order += window.source.tolist()
        within = max(within, window.within)
    drawn = np.eye(sources)[order[:stop]].cumsum(axis=0)
    assert within <= 1.5 and np.abs(drawn - np.array(owed[1:], dtype=float)).max() <= within + 1e-6
    assert all(most is None or drawn[-1][i] <= most for i, most in enumerate(limits))


def blend_of(weights: list[float], rows: list[int], **changes: object) -> Blend:
    sources = [BlendSource(f"s{i}", w, n) for i, (w, n) in enumerate(zip(weights, rows, strict=True))]
    return Blend(sources, seed=3, **changes)  # type: ignore[arg-type]


@settings(max_examples=30)
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


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), together=st.sampled_from([0, 2]))
def test_every_position_of_a_row_is_found(seed: int, together: int) -> None:
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


def test_a_cap_on_repeats_is_checked_before_training_and_respected() -> None:
    blend = Blend([BlendSource("a", 0.5, 100, max_epochs=2), BlendSource("b", 0.5, 1000)], seed=0, row_tokens=64)
    blend.check_length(400, global_rows=8)
    assert (blend.draw(np.arange(400)).source == 0).sum() == 200
    at = blend.curriculum.window(0).source.tolist().index(0, 400)
    refused = (
        rf"'a' runs out at step {at // 8 + 1} \(row {at}, token {at * 64:,}\): max_epochs=2 of its 100 rows are 200, "
        r"but the run's 402 rows would contain 201 \(2.01 epochs\)\.\n.*data\.on_exhausted=continue"
    )
    with pytest.raises(DataError, match=refused):
        blend.check_length(402, global_rows=8)
    with pytest.raises(DataError, match=f"'a' has been read max_epochs=2 times at position {at}"):
        blend.draw(np.arange(396, 410))


def test_after_a_source_runs_out_the_others_continue_in_proportion() -> None:
    """1.5 epochs of a, then b and c 2 : 1; rows still come once an epoch, wherever reading starts."""
    sources = [BlendSource("a", 0.7, 100, max_epochs=1.5), BlendSource("b", 0.2, 90), BlendSource("c", 0.1, 50)]
    blend = Blend(sources, seed=0, replace_exhausted=True)
    blend.check_length(10**9)
    ((name, place),) = blend.exhausted(10**9)
    assert name == "a" and 0.7 * place <= 150 < 0.7 * (place + 1)
    draw = blend.draw(np.arange(2000))
    mine = draw.row[draw.source == 0]
    assert (
        len(mine) in (149, 150) and sorted(mine[:100]) == list(range(100)) and len(set(mine[100:])) == len(mine) - 100
    )
    late = draw.source[place:]
    assert abs((late == 1).sum() - len(late) * 2 / 3) <= 2 and (draw.source[place + 2 :] != 0).all()
    assert np.array_equal(
        Blend(sources, seed=0, replace_exhausted=True).draw(np.arange(1900, 2000)).row, draw.row[1900:]
    )
    assert blend.positions_of(0, 5, stop=2000) == np.flatnonzero((draw.source == 0) & (draw.row == 5)).tolist()


def test_if_all_sources_run_out_the_run_is_refused_with_the_step() -> None:
    sources = [BlendSource("a", 0.5, 10, max_epochs=1), BlendSource("b", 0.5, 30, max_epochs=2)]
    blend = Blend(sources, seed=0, replace_exhausted=True)
    end = blend.curriculum.stop
    assert end == 70 and len(blend.draw(np.arange(end)).row) == end
    blend.check_length(end)
    with pytest.raises(DataError, match=rf"at row {end} \(step 18, .* has been read max_epochs times; .* row 72"):
        blend.check_length(72, global_rows=4)
    with pytest.raises(DataError, match="has been read max_epochs times"):
        blend.draw(np.array([end]))
    assert blend.epochs(100).tolist() == (blend.curriculum.drawn(end) / [10, 30]).tolist()


@pytest.mark.parametrize("place", [150, 9_000])
def test_a_phase_added_later_leaves_what_was_drawn_before_it_but_for_a_row_a_source(place: int) -> None:
    weights = [0.31, 0.23, 0.2, 0.17, 0.09]
    before = blend_of(weights, [10**6] * 5).draw(np.arange(place))
    phases = [PhaseConfig(place, {"s0": 1, "s3": 5, "s4": 2})]
    after = blend_of(weights, [10**6] * 5, phases=phases).draw(np.arange(place))
    for source in range(5):
        rows = [set(draw.row[draw.source == source].tolist()) for draw in (before, after)]
        assert len(rows[0] ^ rows[1]) <= 1


def test_the_identity_of_an_order_says_how_it_is_laid_out() -> None:
    """Constant shares keep the order of version 1; other recipes record a new version, because their rows differ."""
    assert blend_of([0.6, 0.4], [50, 50]).order == 1
    assert blend_of([0.6, 0.4], [50, 50], phases=[PhaseConfig(100, {"s0": 1.0})]).order == 2
    assert blend_of([0.1234567, 0.4], [50, 50]).order == 2


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([PhaseConfig(100, {"s9": 1.0})], r"data.phases\[0\].weights names s9, but data.sources has s0, s1"),
        ([PhaseConfig(100, {"s0": 0.0})], r"phases\[0\].weights: all weights are 0"),
        (
            [PhaseConfig(100, {"s0": 1}, ramp_tokens=50), PhaseConfig(140, {"s1": 1})],
            "before the end of the previous phase",
        ),
    ],
)
def test_contradictory_phases_are_refused(phases: list[PhaseConfig], message: str) -> None:
    with pytest.raises(DataError, match=message):
        blend_of([1.0, 2.0], [50, 50], phases=phases)
