"""Predicted size of a checkpoint against its files."""

from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import engine_of, recipe_with

from launch.plan.cost.device import device_named
from launch.plan.planner import checkpoints_of
from recipes.schema.recipe import Recipe
from train.build import check
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState


def save(rank: int, recipe: Recipe, folder: Path) -> None:
    with engine_of(recipe, rank=rank, world=1) as engine:
        CheckpointFolder(folder, recipe.checkpoint).save(engine, RunState(step=1, position=1, data_hash="h"))


@pytest.mark.parametrize("params", ["bf16", "fp32"])
def test_a_checkpoint_is_as_large_as_planned(params: str, tmp_path: Path) -> None:
    recipe = recipe_with(**{"precision.params": params, "model.hidden": 128, "model.ffn": 512, "model.vocab": 4096})
    run_ranks(1, save, recipe, tmp_path)
    found = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    planned = checkpoints_of(recipe, layout=check(recipe, world=1), device=device_named("h100"))
    assert planned.size_bytes == pytest.approx(found, rel=0.03)
