"""Held-out preferences: metrics by hand, and the same at every layout, also where ranks get rows only to fill a microbatch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from preference_rows import drawn_rows
from ranks import run_ranks
from tiny import engine_of, recipe_with

from data.batch import Batch
from recipes.schema.recipe import Recipe
from train.evaluate.ask import TaskResult
from train.evaluate.heldout_preferences import heldout_preferences, metrics_of, recorded
from train.evaluate.results import results_table

REWARD: dict[str, Any] = {"model.head": "scalar", "objective.kind": "reward", "data.reset_at_documents": True}
LAYOUTS = {
    "VPP2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "TP2 SP CP2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2}),
    "DP3": (3, {"run.global_rows": 3}),
}


class Rows:
    """Two sources: five rows, and none."""

    source_names = ("five", "none")
    manifest_hash = "hash"

    def heldout_count(self, name: str) -> int:
        return 5 if name == "five" else 0

    def heldout_rows(self, name: str, first: int, count: int) -> Batch:
        return drawn_rows(3, np.arange(first, first + max(1, count)))


def scored(rank: int, recipe: Recipe, world: int) -> dict[str, tuple[int, dict[str, float]]]:
    with engine_of(recipe, rank=rank, world=world) as engine:
        results = heldout_preferences(engine, Rows(), rows_per_source=9)
        assert engine.chunks[0].training
        return {one.name: (one.items, {name: found.value for name, found in one.metrics.items()}) for one in results}


@pytest.fixture(scope="module")
def single() -> dict[str, tuple[int, dict[str, float]]]:
    (found,) = run_ranks(1, scored, recipe_with(**REWARD), 1)
    return found


def test_every_pair_of_the_sources_that_have_some_counts(single: dict[str, tuple[int, dict[str, float]]]) -> None:
    ranks = drawn_rows(3, np.arange(5))
    assert ranks.ranks is not None and ranks.groups is not None
    expected = 0
    for row in range(5):
        for group in range(int(ranks.groups[row].max()) + 1):
            own = ranks.ranks[row][ranks.groups[row] == group].tolist()
            expected += sum(a < b for a in own for b in own)
    assert list(single) == ["heldout/five"] and single["heldout/five"][0] == expected > 20


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_metrics_of_one_process(name: str, single: dict[str, tuple[int, dict[str, float]]]) -> None:
    world, changes = LAYOUTS[name]
    for found in run_ranks(world, scored, recipe_with(**{**REWARD, **changes}), world):
        assert found.keys() == single.keys()
        items, metrics = single["heldout/five"]
        assert found["heldout/five"][0] == items
        assert found["heldout/five"][1] == pytest.approx(metrics, rel=2e-6)


def test_metrics_by_hand() -> None:
    better = torch.tensor([math.log(3), math.log(3), 0.5, -math.log(3)], dtype=torch.float64)
    worse = torch.tensor([0.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    found = metrics_of(better, worse)
    assert found["accuracy"].value == pytest.approx(2.5 / 4)
    # Three pairs with confidence 3/4, of which 2 are right; a tie with confidence 1/2 that counts half.
    assert found["calibration_error"].value == pytest.approx(abs(3 * 0.75 - 2) / 4)
    losses = [math.log(4 / 3)] * 2 + [math.log(2), math.log(4)]
    assert found["loss"].value == pytest.approx(sum(losses) / 4)
    assert not found["loss"].higher_is_better and found["accuracy"].low < 0.625 < found["accuracy"].high
    (task,) = recorded([TaskResult("heldout/a", "preferences", "", 4, found)]).values()
    intervals = list(results_table({"heldout/a": task}, title="").columns[4].cells)
    assert intervals[1] == "n/a" and " to " in intervals[0] and "unknown" not in "".join(map(str, intervals))
