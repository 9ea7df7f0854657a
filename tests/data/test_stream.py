"""The one-integer law: the global stream does not depend on ranks, threads, microbatches or interruptions."""

import logging
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from shards import random_documents, write_folder

from data.stream import Dataset, Stream, open_dataset
from recipes.schema.data import DataConfig, PhaseConfig, SourceConfig
from recipes.schema.errors import DataError

GLOBAL = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of several shards: 40 to 100 rows of 16 tokens each."""
    path = tmp_path_factory.mktemp("sources")
    parts = {name: random_documents(count, seed=count) for name, count in (("a", 80), ("b", 60), ("c", 35))}
    write_folder(path, {n: [d[: len(d) // 3], d[len(d) // 3 : -5], d[-5:]] for n, d in parts.items()})
    return path


def config_of(folder: Path, **changes: object) -> DataConfig:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    fields = {
        "folder": str(folder),
        "sources": {name: SourceConfig(path="-", weight=weight) for name, weight in weights.items()},
        "row_tokens": 16,
    }
    return DataConfig(**(fields | changes))  # type: ignore[arg-type]


def read(
    dataset: Dataset, *, ranks: int, microbatch_rows: int, steps: int, position: int = 0, threads: int = 1
) -> dict[int, tuple]:
    """Rows by global position, as all ranks of a data-parallel group read them; each position once."""
    seen: dict[int, tuple] = {}
    for rank in range(ranks):
        with Stream(
            dataset,
            position=position,
            global_rows=GLOBAL,
            microbatch_rows=microbatch_rows,
            rank=rank,
            ranks=ranks,
            prefetch_steps=2,
            threads=threads,
        ) as stream:
            for _ in range(steps):
                for batch in next(stream):
                    for i, place in enumerate(batch.positions.tolist()):
                        assert place not in seen
                        seen[place] = (batch.tokens[i].tolist(), batch.labels[i].tolist(), int(batch.source[i]))
            assert stream.position == position + GLOBAL * steps
    return seen


schedules = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 3)),
    min_size=1,
    max_size=6,
)  # ranks, microbatch rows, steps, threads


@settings(max_examples=25)
@given(
    schedule=schedules,
    packing=st.sampled_from(["chunk", "best_fit"]),
    together=st.sampled_from([0, 1, 2]),
    phases=st.lists(
        st.tuples(st.integers(1, 2000), st.sampled_from([0, 700]), st.tuples(*[st.integers(0, 9)] * 3).filter(any)),
        max_size=2,
    ),
    most=st.none() | st.floats(0.1, 2.0),
)
def test_any_schedule_of_ranks_threads_and_microbatches_gives_the_identical_stream(
    folder: Path,
    schedule: list[tuple[int, int, int, int]],
    packing: str,
    together: int,
    phases: list,
    most: float | None,
) -> None:
    """Also across phases, ramps, epochs and a source that runs out, resumed from one integer wherever the schedule changes."""
    at, curriculum = 0, []
    for gap, ramp, weights in phases:
        weights = weights if most is None else (max(1, weights[0]), *weights[1:])  # something is left when c runs out
        curriculum.append(PhaseConfig(at + gap, dict(zip("abc", weights, strict=True)), ramp_tokens=ramp))
        at += gap + ramp + 16
    config = config_of(folder, packing=packing, phases=tuple(curriculum), shuffle_shards=together)
    capped = {"c": SourceConfig(path="-", weight=0.2, max_epochs=most)}
    config = replace(config, sources=config.sources | capped, on_exhausted="continue")
    dataset = open_dataset(config)
    total = sum(steps for _, _, steps, _ in schedule)
    reference = read(open_dataset(config), ranks=1, microbatch_rows=GLOBAL, steps=total)
    seen: dict[int, tuple] = {}
    for ranks, microbatch_rows, steps, threads in schedule:
        seen |= read(
            dataset, ranks=ranks, microbatch_rows=microbatch_rows, steps=steps, position=len(seen), threads=threads
        )
    assert seen == reference and sorted(seen) == list(range(total * GLOBAL))


def test_one_two_four_three_one_ranks_show_every_row_once_an_epoch(folder: Path) -> None:
    """A list of all (source, row), written while the number of ranks changes, over several epochs of the smallest source."""
    dataset = open_dataset(config_of(folder))
    ledger: list[tuple[int, int]] = []
    seen: dict[int, tuple] = {}
    for ranks, microbatch_rows in ((1, 8), (2, 3), (4, 2), (3, 8), (1, 24)):
        seen |= read(dataset, ranks=ranks, microbatch_rows=microbatch_rows, steps=5, position=len(seen))
    assert sorted(seen) == list(range(5 * 5 * GLOBAL))
    assert seen == read(dataset, ranks=1, microbatch_rows=GLOBAL, steps=25)
    at = [dataset.locate(position) for position in range(len(seen))]
    ledger = [(row.source, row.row) for row in at]
    times = Counter(ledger)
    for source, rows in enumerate(dataset.train):
        counts = [times[source, row] for row in range(rows.count)]
        assert max(counts) - min(counts) <= 1  # none a second time before all came once
        drawn = [row.row for row in at if row.source == source]
        for epoch in range(len(drawn) // rows.count):
            assert sorted(drawn[epoch * rows.count : (epoch + 1) * rows.count]) == list(range(rows.count))
    assert len(times) == sum(rows.count for rows in dataset.train)
    assert max(times.values()) >= 3


def test_order_depends_on_the_seed(folder: Path) -> None:
    one = open_dataset(config_of(folder)).training_rows(np.arange(20)).tokens
    two = open_dataset(config_of(folder, seed=5)).training_rows(np.arange(20)).tokens
    assert not (one == two).all()


def rows_of_rank(rank: int, folder: Path) -> tuple[int, list]:
    from tiny import recipe_with

    from train.build import check, mesh_of

    recipe = recipe_with(**{"parallel.tensor": 2, "run.global_rows": 8, "run.microbatch_rows": 2})
    import torch

    torch.set_num_threads(1)
    with mesh_of(recipe, check(recipe, world=4), device=torch.device("cpu"), rank=rank) as mesh:
        with Stream(
            open_dataset(config_of(folder)),
            position=16,
            global_rows=8,
            microbatch_rows=2,
            rank=mesh.data_rank,
            ranks=mesh.layout.data,
            prefetch_steps=2,
        ) as stream:
            return mesh.data_rank, [batch.positions.tolist() for batch in next(stream)]


def test_tensor_ranks_see_the_same_rows_and_data_ranks_different_ones(folder: Path) -> None:
    results = run_ranks(4, rows_of_rank, folder)
    by_data_rank: dict[int, list] = {}
    for data_rank, rows in results:
        assert by_data_rank.setdefault(data_rank, rows) == rows
    assert sorted(place for rows in by_data_rank.values() for batch in rows for place in batch) == list(range(16, 24))


class SlowRows:
    """Stands for a dataset whose file does not answer."""

    def __init__(self, dataset: Dataset, seconds: float) -> None:
        self.activity = dataset.activity
        self._dataset, self._seconds, self.hold = dataset, seconds, threading.Event()

    def fetch_ahead(self, position: int) -> None:
        return None

    def training_rows(self, positions: np.ndarray) -> object:
        if positions[0] >= GLOBAL:
            with self.activity.of("reading s3://bucket/web-00017.bin"):
                self.hold.wait(self._seconds)
        return self._dataset.training_rows(positions)


def test_a_stall_names_the_file_then_ends_the_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowRows(open_dataset(config_of(folder)), seconds=60)
    with Stream(
        slow,  # type: ignore[arg-type]
        position=0,
        global_rows=GLOBAL,
        microbatch_rows=8,
        rank=0,
        ranks=1,
        prefetch_steps=2,
        stall_warning_s=0.1,
        stall_limit_s=0.35,
    ) as stream:
        next(stream)
        began = time.monotonic()
        with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=r"s3://bucket/web-00017.bin \(for 0 s\)"):
            next(stream)
        assert 0.3 < time.monotonic() - began < 2
        slow.hold.set()
    assert "no rows for 0 s: reading s3://bucket/web-00017.bin" in caplog.text


def test_what_a_reading_thread_raises_reaches_the_trainer_every_time(folder: Path) -> None:
    capped = config_of(folder)
    capped = replace(capped, sources=capped.sources | {"c": SourceConfig(path="-", weight=0.2, max_epochs=1)})
    with Stream(
        open_dataset(capped), position=0, global_rows=8, microbatch_rows=8, rank=0, ranks=1, prefetch_steps=3, threads=3
    ) as stream:
        with pytest.raises(DataError, match="source 'c' has been read max_epochs=1 times at position"):
            for _ in range(100):
                next(stream)
        with pytest.raises(DataError, match="source 'c'"):
            next(stream)
