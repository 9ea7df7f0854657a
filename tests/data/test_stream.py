"""The order of training: a pure function of the position, shares exact at every prefix, each row once an epoch."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.blend import Blend, permute, whole_weights
from data.config import DataConfig
from data.errors import DataError
from data.pack import Rows
from data.shards import Shard
from data.stream import Stream, open_dataset


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_a_permutation_reaches_each_row_once(size: int, key: int, epoch: int) -> None:
    index = np.arange(size)
    rows = permute(index, np.full(size, epoch), size=size, key=key)
    assert np.array_equal(np.sort(rows), index)


def test_permutations_differ_by_epoch_and_mix_well() -> None:
    index = np.arange(10_000)
    first, second = (permute(index, np.full(10_000, e), size=10_000, key=7) for e in (0, 1))
    assert (first == second).mean() < 0.01
    # A uniform permutation moves a row by a third of the range on average.
    assert abs(np.abs(first - index).mean() / 10_000 - 1 / 3) < 0.02


weights = st.lists(st.integers(1, 60).map(lambda n: n / 10), min_size=1, max_size=6)


@settings(deadline=None)
@given(weights=weights, rows=st.integers(1, 50), seed=st.integers(0, 99), start=st.integers(0, 10**13))
def test_shares_are_within_one_row_at_every_prefix(weights: list[float], rows: int, seed: int, start: int) -> None:
    names = [f"s{i}" for i in range(len(weights))]
    blend = Blend(names, weights, [rows] * len(names), seed=seed)
    exact = [Fraction(str(w)) for w in weights]
    shares = [w / sum(exact) for w in exact]
    source = blend.draw(np.arange(400)).source
    drawn = np.zeros(len(names), dtype=int)
    for position, which in enumerate(source, start=1):
        drawn[which] += 1
        for count, share in zip(drawn, shares, strict=True):
            assert abs(count - position * share) <= 1
    # Any position by itself, in any order, gives what it gives in the sequence; far positions open as fast as near ones.
    shuffled = np.random.default_rng(seed).permutation(400)
    assert np.array_equal(blend.draw(shuffled).source, source[shuffled])
    far = blend.draw(np.arange(start, start + blend.period))
    assert np.array_equal(np.bincount(far.source, minlength=len(names)), blend.per_period)


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_each_row_is_drawn_once_an_epoch(rows: list[int], seed: int) -> None:
    blend = Blend([f"s{i}" for i in range(len(rows))], [1.0] * len(rows), rows, seed=seed)
    draw = blend.draw(np.arange(3 * max(rows) * len(rows)))
    for source, count in enumerate(rows):
        mine = draw.source == source
        for epoch in range(int(draw.epoch[mine].max())):
            seen = draw.row[mine & (draw.epoch == epoch)]
            assert sorted(seen) == list(range(count))


def test_weights_become_the_smallest_whole_numbers() -> None:
    assert whole_weights([0.6, 0.4]) == [3, 2]
    assert whole_weights([1, 1, 2]) == [1, 1, 2]
    rounded = whole_weights([0.123456789, 0.876543211])
    assert sum(rounded) == 4096 and rounded[0] == round(0.123456789 * 4096)


@given(length=st.integers(2, 200), row_tokens=st.integers(1, 30), cuts=st.lists(st.integers(1, 199), max_size=5))
def test_every_token_but_the_first_is_a_label_once(length: int, row_tokens: int, cuts: list[int]) -> None:
    ends = np.array(sorted({c for c in cuts if c < length} | {length}))
    rows = Rows([Shard(prefix=Path("x"), tokens=np.arange(length), ends=ends)], row_tokens)
    if rows.count == 0:
        assert length <= row_tokens
        return
    both = rows.tokens(np.arange(rows.count))
    used = rows.count * row_tokens
    assert both[:, 1:].flatten().tolist() == list(range(1, used + 1))
    assert both[:, :-1].flatten().tolist() == list(range(used))
    assert rows.cropped_tokens == length - used - 1
    documents = np.searchsorted(ends, np.arange(used), side="right").reshape(rows.count, row_tokens)
    assert np.array_equal(rows.documents(np.arange(rows.count)), documents - documents[:, :1])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), row_tokens=st.integers(1, 30))
def test_rows_do_not_see_where_shards_end(lengths: list[int], row_tokens: int) -> None:
    stream = np.arange(sum(lengths))
    whole = Rows([Shard(prefix=Path("x"), tokens=stream, ends=np.cumsum(lengths))], row_tokens)
    pieces = np.split(stream, np.cumsum(lengths)[:-1])  # each document in a shard of its own
    cut = Rows([Shard(prefix=Path("x"), tokens=p, ends=np.array([len(p)])) for p in pieces], row_tokens)
    rows = np.arange(whole.count)
    assert (cut.count, cut.cropped_tokens) == (whole.count, whole.cropped_tokens)
    assert np.array_equal(cut.tokens(rows), whole.tokens(rows))
    assert np.array_equal(cut.documents(rows), whole.documents(rows))


def steps_of(dataset, *, ranks: int, microbatch_rows: int, steps: int, position: int = 0) -> dict[int, tuple]:
    """Rows by global position, as all ranks of a data-parallel group read them."""
    seen: dict[int, tuple] = {}
    for rank in range(ranks):
        with Stream(
            dataset,
            position=position,
            global_rows=24,
            microbatch_rows=microbatch_rows,
            rank=rank,
            ranks=ranks,
            prefetch_steps=2,
        ) as stream:
            for _ in range(steps):
                for batch in next(stream):
                    for i, place in enumerate(batch.positions):
                        assert int(place) not in seen
                        seen[int(place)] = (batch.tokens[i].tolist(), batch.labels[i].tolist(), int(batch.source[i]))
            assert stream.position == position + 24 * steps
    return seen


@pytest.mark.parametrize(("ranks", "microbatch_rows"), [(1, 1), (2, 3), (4, 2), (3, 8), (12, 2)])
def test_the_global_stream_does_not_depend_on_ranks_or_microbatches(
    prepared: DataConfig, ranks: int, microbatch_rows: int
) -> None:
    dataset = open_dataset(prepared)
    reference = steps_of(dataset, ranks=1, microbatch_rows=24, steps=4)
    assert steps_of(dataset, ranks=ranks, microbatch_rows=microbatch_rows, steps=4) == reference
    assert sorted(reference) == list(range(96))


def test_resuming_is_one_integer(prepared: DataConfig) -> None:
    dataset = open_dataset(prepared)
    whole = steps_of(dataset, ranks=1, microbatch_rows=24, steps=5)
    rest = steps_of(dataset, ranks=2, microbatch_rows=4, steps=3, position=48)
    assert rest == {place: row for place, row in whole.items() if place >= 48}


def test_order_depends_on_the_seed(prepared: DataConfig) -> None:
    one = open_dataset(prepared).training_rows(np.arange(20)).tokens
    two = open_dataset(replace(prepared, seed=5)).training_rows(np.arange(20)).tokens
    assert not (one == two).all()


def test_what_the_reader_thread_raises_reaches_the_trainer(prepared: DataConfig) -> None:
    dataset = open_dataset(prepared)
    shard = Path(prepared.folder) / "verse/00000.train.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)  # replaced in mid-run
    with (
        Stream(dataset, position=0, global_rows=8, microbatch_rows=8, rank=0, ranks=1, prefetch_steps=1) as stream,
        pytest.raises(DataError, match="outside the vocabulary"),
    ):
        for _ in range(10):
            next(stream)
