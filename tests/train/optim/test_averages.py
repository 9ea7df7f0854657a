"""The moving average of weights against torch's AveragedModel, at layouts that divide it, and as a run of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import engine_of, recipe_with, steps_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recipes.schema.checkpoint_steps import name_of
from recipes.schema.errors import CheckpointError
from recipes.schema.optim import OptimConfig
from recipes.schema.optim_rules import optim_notes
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.checkpoint.pieces import OptimizerPart, local_tensors_of, optimizer_parts
from train.checkpoint.tensors import StoredTensors
from train.engine import Engine
from train.merge.weighted_sum import source_at, write_run

DECAY, STEPS = 0.6, 3
MODEL: dict[str, Any] = {"model.pattern": "M*-", "optim.ema_decay": DECAY}


def parts_of(engine: Engine) -> list[OptimizerPart]:
    modules = [chunk.module for chunk in engine.chunks]
    return optimizer_parts(engine.optimizer, modules, local_tensors_of(modules, engine.mesh.groups.dp_cp))


def averaged_by_torch(rank: int, recipe: Recipe, world: int, folder: Path) -> dict[str, torch.Tensor]:
    """Train, compare this rank's slices with torch's class, and save. -> torch's averages of whole weights (of one process)."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        parts = parts_of(engine)
        masters = torch.nn.ParameterList([torch.nn.Parameter(part.master.clone()) for part in parts])
        theirs = AveragedModel(masters, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        for step in range(STEPS):
            steps_of(engine, recipe, range(step, step + 1))
            for mine, part in zip(masters, parts, strict=True):
                mine.data.copy_(part.master)
            theirs.update_parameters(masters)
        for part, average, master in zip(parts, theirs.module, masters, strict=True):
            torch.testing.assert_close(part.moments["ema"], average.detach(), rtol=0, atol=1e-7)
            assert part.moments["ema"].dtype == torch.float32 and not torch.equal(average, master)
        state = RunState(step=STEPS, position=0, data_hash="h", recipe=recipe_mapping(recipe), tokenizer="t" * 64)
        CheckpointFolder(folder / "checkpoints", recipe.checkpoint).save(engine, state)
        if world > 1:
            return {}
        switch_off_and_on(engine, recipe, folder)
        return {
            part.local.components[0].name: average.detach().view(part.parameter.shape)
            for part, average in zip(parts, theirs.module, strict=True)
            if len(part.local.components) == 1
        }


def switch_off_and_on(engine: Engine, recipe: Recipe, folder: Path) -> None:
    """Continue the checkpoint without an average, save, and continue that with one."""
    states = [state for part in engine.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    averages = [state.pop("ema") for state in states]
    found = CheckpointFolder(folder / "checkpoints", recipe.checkpoint).resume(engine)
    assert found is not None and not found.notes
    without = CheckpointFolder(folder / "without" / "checkpoints", recipe.checkpoint)
    without.save(engine, RunState(step=STEPS, position=0, data_hash="h"))
    for state, average in zip(states, averages, strict=True):
        state["ema"] = average.zero_()
    found = without.resume(engine)
    assert found is not None and not found.notes
    assert all(torch.equal(part.moments["ema"], part.master) for part in parts_of(engine))


def test_averages_are_those_of_torch_and_become_a_run(tmp_path: Path) -> None:
    expected = run_ranks(1, averaged_by_torch, recipe_with(**MODEL), 1, tmp_path)[0]
    assert {"decoder.final_norm.weight", "output_layer.weight"} <= expected.keys()
    source = source_at(tmp_path)
    write_run(tmp_path / "averaged", [source], [1.0], rule={}, keep_step=True, advance=lambda _: None, averaged=True)
    written = StoredTensors(tmp_path / "averaged" / "checkpoints" / name_of(STEPS))
    for name, average in expected.items():
        torch.testing.assert_close(written.read(name), average, rtol=0, atol=1e-7)
        assert not torch.equal(written.read(name), StoredTensors(source.path).read(name))
    with pytest.raises(CheckpointError, match=r"has no moving average of its weights .*Train with optim.ema_decay"):
        StoredTensors(tmp_path / "without" / "checkpoints" / name_of(STEPS), averaged=True)


def test_slices_of_averages_are_those_of_torch(tmp_path: Path) -> None:
    """bf16 weights: the average is of the fp32 masters. Muon: of its matrices too."""
    recipe = recipe_with(**MODEL, **{"precision.params": "bf16", "optim.kind": "muon", "parallel.tensor": 2})
    run_ranks(4, averaged_by_torch, recipe, 4, tmp_path)


def test_an_average_longer_than_the_run_is_noted() -> None:
    (note,) = optim_notes(OptimConfig(ema_decay=0.999), steps=100)
    assert "averages over about 1,000 steps, but the run has 100" in str(note)
    assert not optim_notes(OptimConfig(ema_decay=0.99), steps=100) and not optim_notes(OptimConfig(), steps=1)
