"""Checkpoints without optimizer state (imported, pruned or converted weights, with lineage) as the start of a run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import trained
from ranks import run_ranks
from tiny import engine_of, recipe_with, steps_of, weights_at

from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState, read_manifest
from train.checkpoint.storage import publish
from train.checkpoint.tensors import StoredTensors, write_weights
from train.model.initial import global_names


def weights_alone(path: Path, folder: Path) -> None:
    """The weights of a checkpoint as a checkpoint without optimizer state, written as pruning writes one."""
    stored, aside = StoredTensors(path), folder / ".writing"
    aside.mkdir(parents=True)
    write_weights(aside, stored.weights, stored.read)
    lineage = {"pruned_from": "somewhere", "kept_heads": [0, 2]}
    publish(aside, folder / "step_00000000", RunState(recipe=read_manifest(path).recipe, lineage=lineage))
    manifest = read_manifest(folder / "step_00000000")
    assert manifest.lineage == lineage and manifest.updates is None


def start_from(rank: int, recipe: Recipe, world: int, folder: Path) -> tuple[Any, str, dict[str, torch.Tensor]]:
    """Resume from weights alone; save again. -> numbers of training, lineage of the next checkpoint, weights."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        found = checkpoints.resume(engine)
        assert found is not None and found.manifest.step == 0
        weights = {n: p.detach().clone() for chunk in engine.chunks for n, p in global_names(chunk.module)}
        numbers = steps_of(engine, recipe, range(3))
        path = checkpoints.save(engine, RunState(step=3, position=12, data_hash="h", lineage=found.manifest.lineage))
        return numbers, read_manifest(path).lineage["pruned_from"], weights


def test_weights_alone_begin_a_run_with_fresh_moments(tmp_path: Path) -> None:
    """Saved on two tensor ranks, they start a run on one and on two data ranks alike, and load as a teacher's."""
    other = recipe_with(**{"run.seed": 99})
    tensor = recipe_with(**{"parallel.tensor": 2})
    weights_alone(trained(tmp_path / "saved", tensor, world=2), tmp_path / "checkpoints")
    (numbers, lineage, weights), *_ = run_ranks(1, start_from, other, 1, tmp_path / "checkpoints")
    assert lineage == "somewhere"
    taught = run_ranks(1, weights_at, other, 1, tmp_path / "checkpoints" / "step_00000000")[0]
    assert weights.keys() == taught.keys() and all(torch.equal(weights[n], taught[n]) for n in weights)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000003")
    for again, _, _ in run_ranks(2, start_from, other, 2, tmp_path / "checkpoints"):
        assert again.losses == pytest.approx(numbers.losses, rel=2e-6)
