"""Slow ranks are found soon, and ranks that are only noisy are not: synthetic times with measured and with normal noise."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_runs import Run, recipe_in

from recipes.schema.layout import Layout, stages_of
from train.objective import next_token
from train.parallel.mesh import Mesh
from train.resilience.stragglers import WINDOW, Stragglers, _median_of_others

MEASURED = (
    0.557, 0.607, 0.635, 0.654, 0.68, 0.687, 0.715, 0.737, 0.746, 0.778, 0.788, 0.793, 0.858, 0.872, 0.878, 0.883, 0.895, 0.921,
    0.95, 0.976, 1.01, 1.046, 1.081, 1.225, 1.286, 1.484, 1.596, 1.623, 1.693, 1.773, 1.835, 1.882, 1.981, 2.136, 2.187, 2.27,
    2.52, 3.28, 3.842, 3.985,
)  # fmt: skip
"""Quantiles of forward and backward times over their median: 160 steps of the smoke recipe on two very busy cores."""
Noise = Callable[[np.random.Generator, int], np.ndarray]
NOISE: dict[str, Noise] = {
    "measured": lambda random, count: random.choice(MEASURED, count),
    "5 % and pauses": lambda random, count: (
        np.exp(0.05 * random.standard_normal(count)) + (random.random(count) < 0.05)
    ),
}


def named_at(noise: Noise, *, steps: int, factors: dict[int, float], ranks: int = 8, seed: int = 0) -> dict[int, int]:
    """Step at which each rank is named. factors: how much slower ranks are."""
    random = np.random.default_rng(seed)
    stragglers, found = Stragglers([list(range(ranks // 2)), list(range(ranks // 2, ranks))]), {}
    for end in range(WINDOW, steps + 1, WINDOW):
        # the second stage has twice the work of the first
        times = [factors.get(rank, 1.0) * (1 + rank // 4) * noise(random, WINDOW) for rank in range(ranks)]
        for slow in stragglers.window([one.tolist() for one in times]):
            found.setdefault(slow.rank, end)
    return found


@pytest.mark.parametrize("noise", NOISE)
def test_no_false_alarm_in_2000_steps(noise: str) -> None:
    for seed in range(5):
        assert named_at(NOISE[noise], steps=2000, factors={}, seed=seed) == {}


def test_a_rank_that_is_20_percent_slower_is_named_within_50_steps() -> None:
    for seed in range(20):
        found = named_at(NOISE["5 % and pauses"], steps=60, factors={5: 1.2}, seed=seed)
        assert found.keys() == {5} and found[5] <= 50


def test_in_measured_noise_only_a_rank_that_is_much_slower_can_be_told() -> None:
    """Each rank's noise is its own here: the worst case."""
    found = named_at(NOISE["measured"], steps=100, factors={2: 4.0})
    assert found.keys() == {2}


BUSY = np.loadtxt(Path(__file__).with_name("busy_cores.txt")).T / 1e5
"""[2 ranks, 2,000 steps] forward and backward times in seconds, recorded on two cores that ran other programs too (load 5)."""


def named_in_record(slower: float) -> list[tuple[int, int]]:
    """(step, rank) of each warning if rank 1 takes `slower` times as long."""
    stragglers, times = Stragglers([[0, 1]]), BUSY * [[1.0], [slower]]
    ends = range(WINDOW, BUSY.shape[1] + 1, WINDOW)
    return [(end, slow.rank) for end in ends for slow in stragglers.window(times[:, end - WINDOW : end].tolist())]


def test_two_busy_cores_give_no_false_alarm_in_2000_recorded_steps() -> None:
    assert named_in_record(1.0) == []


def test_in_the_record_of_busy_cores_a_slow_rank_is_named_although_steps_vary_sevenfold() -> None:
    assert np.quantile(BUSY, 0.99) / np.quantile(BUSY, 0.05) > 6
    assert {rank for _, rank in named_in_record(1.2)} == {1}
    assert named_in_record(2.0)[0] == (40, 1)


def test_the_median_of_the_others_is_that_of_numpy() -> None:
    for ranks in (2, 3, 4, 7):
        logs = np.random.default_rng(ranks).standard_normal((ranks, 5))
        expected = [np.median(np.delete(logs, rank, axis=0), axis=0) for rank in range(ranks)]
        np.testing.assert_allclose(_median_of_others(logs), expected)


def test_stages_are_the_ranks_with_the_same_work() -> None:
    layout = Layout(world=8, tensor=2, pipeline=2, context=1, data=2, virtual=1, microbatches_per_step=1)
    assert stages_of(layout) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_run_names_its_slow_rank_and_records_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next_token.forward_step

    def slower(mesh: Mesh, **named: Any) -> Callable[..., Any]:
        step = real(mesh, **named)
        return lambda *given: (time.sleep(0.15 * mesh.rank), step(*given))[1]

    monkeypatch.setattr(next_token, "forward_step", slower)
    recipe = recipe_in(tmp_path, steps_=42)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_steps=0))
    run = Run(recipe, 2, folder=tmp_path / "said")
    run.attempt(None)
    tables = [line for line in run.metrics if line["kind"] == "ranks"]
    assert [line["step"] for line in tables] == [20, 40]
    assert all(line["forward_backward_s"]["1"] > 0.15 for line in tables)
    (warning,) = [line["text"] for line in run.metrics if line["kind"] == "warning"]
    assert re.match(r"step 40: rank 1 computes [\d,]+% longer than the other ranks with the same work", warning)
