"""A small checkpoint that version 0.1.0 wrote (format 2, folder `version_0_1_0`) loads in all later versions.

`write` below wrote it on four ranks (TP2 PP2, bf16, five layers). The same run noted the losses expected after it.
Do not write it again: when the format changes, add another folder.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crashes import SMALL
from ranks import run_ranks
from tiny import engine_of, steps_of

from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from train.checkpoint import offline
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState

OLD = Path(__file__).with_name("version_0_1_0")
BF16 = replace(SMALL, precision=replace(SMALL.precision, params="bf16"))
FOUR = replace(
    BF16,
    parallel=replace(SMALL.parallel, tensor=2, pipeline=2),
    model=replace(SMALL.model, pattern="M*-|M-"),
    run=replace(SMALL.run, name="kept"),
)


def write(rank: int, folder: Path) -> dict[str, Any]:
    with engine_of(FOUR, rank=rank, world=4) as engine:
        steps_of(engine, FOUR, range(2))
        CheckpointFolder(folder, FOUR.checkpoint).save(
            engine, RunState(step=2, position=8, recipe=recipe_mapping(FOUR), data_hash="h")
        )
        numbers = steps_of(engine, FOUR, range(2, 4))
        return {"losses": numbers.losses, "grad_norms": numbers.grad_norms}


def train_two_steps(rank: int, recipe: Recipe, world: int, folder: Path) -> dict[str, Any]:
    with engine_of(recipe, rank=rank, world=world) as engine:
        found = CheckpointFolder(folder, recipe.checkpoint).resume(engine)
        assert found is not None and found.manifest.step == 2 and found.manifest.position == 8 and not found.notes
        numbers = steps_of(engine, recipe, range(2, 4))
        return {"losses": numbers.losses, "grad_norms": numbers.grad_norms}


@pytest.mark.parametrize("world", [1, 4])
def test_a_checkpoint_of_an_old_version_loads_and_trains(world: int, tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "checkpoints")
    recipe = FOUR if world == 4 else replace(FOUR, parallel=SMALL.parallel)
    want = json.loads((OLD / "expected.json").read_text())
    got = run_ranks(world, train_two_steps, recipe, world, tmp_path / "checkpoints")[0]
    assert got["losses"] == pytest.approx(want["losses"], rel=3e-4)
    assert got["grad_norms"] == pytest.approx(want["grad_norms"], rel=3e-3)


def test_a_checkpoint_of_an_old_version_verifies() -> None:
    assert offline.verify(OLD / "step_00000002", lambda _: None) == []
