"""Checkpoints without optimizer state: imported, pruned or converted weights, with their lineage, as a run's beginning."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import engine_of, recipe_with, steps_of

from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState, read_manifest
from train.checkpoint.storage import read_weights, write_model
from train.model.initial import global_names


def write(rank: int, recipe: Recipe, world: int, folder: Path) -> str:
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(1))
        modules = [chunk.module for chunk in engine.chunks]
        lineage = {"pruned_from": "somewhere", "kept_heads": [0, 2]}
        manifest = write_model(
            folder, modules, mesh=engine.mesh, state=RunState(recipe=recipe_mapping(recipe), lineage=lineage)
        )
        assert manifest.lineage == lineage and manifest.updates is None
        return manifest.fingerprint


def start_from(rank: int, recipe: Recipe, world: int, folder: Path) -> tuple[Any, str, dict[str, torch.Tensor]]:
    """Resume where only weights are; save again. -> what training gave, lineage of the next checkpoint, the weights."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        found = checkpoints.resume(engine)
        assert found is not None and found.manifest.step == 0
        weights = {n: p.detach().clone() for chunk in engine.chunks for n, p in global_names(chunk.module)}
        numbers = steps_of(engine, recipe, range(3))
        path = checkpoints.save(engine, RunState(step=3, position=12, data_hash="h", lineage=found.manifest.lineage))
        return numbers, read_manifest(path).lineage["pruned_from"], weights


def teacher(rank: int, recipe: Recipe, world: int, folder: Path) -> dict[str, torch.Tensor]:
    with engine_of(recipe, rank=rank, world=world) as engine:
        modules = [chunk.module for chunk in engine.chunks]
        read_weights(folder, modules, groups=engine.mesh.groups)
        return {n: p.detach().clone() for module in modules for n, p in global_names(module)}


def test_weights_alone_begin_a_run_with_fresh_moments(tmp_path: Path) -> None:
    """Written on two tensor ranks, they start a run on one and on two data ranks alike, and load as a teacher's."""
    other = recipe_with(**{"run.seed": 99})
    tensor = recipe_with(**{"parallel.tensor": 2})
    fingerprints = run_ranks(2, write, tensor, 2, tmp_path / "checkpoints" / "step_00000000")
    assert fingerprints[0] == fingerprints[1]
    alone = run_ranks(1, write, recipe_with(), 1, tmp_path / "one" / "step_00000000")
    assert alone[0] != fingerprints[0]  # one step at another layout rounds differently
    (numbers, lineage, weights), *_ = run_ranks(1, start_from, other, 1, tmp_path / "checkpoints")
    assert lineage == "somewhere"
    taught = run_ranks(1, teacher, other, 1, tmp_path / "checkpoints" / "step_00000000")[0]
    assert weights.keys() == taught.keys() and all(torch.equal(weights[n], taught[n]) for n in weights)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000003")
    for again, _, _ in run_ranks(2, start_from, other, 2, tmp_path / "checkpoints"):
        assert again.losses == pytest.approx(numbers.losses, rel=2e-6)
