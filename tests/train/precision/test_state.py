"""Low-precision state across saves: resume under every recipe, other layouts, other backends, the state of the health policy."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import engine_of, health, recipe_with, steps_of

from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.engine import Engine

LOW = ("delayed", "current", "blockwise", "mxfp8", "nvfp4")
SAVED_AT, STEPS = 2, 4
WIDE: dict[str, Any] = {"run.microbatch_rows": 4}


def state_of(engine: Any) -> dict[tuple[int, str], tuple[list[float], torch.Tensor]]:
    return {
        (linear.layer, linear.name): (
            linear.module.low_precision_scale.tolist(),
            linear.module.low_precision_history.clone(),
        )
        for linear in engine.precision.linears
    }


def save_on_the_way(rank: int, recipe: Recipe, world: int, folder: Path) -> Any:
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(SAVED_AT))
        CheckpointFolder(folder, recipe.checkpoint).save(engine, RunState(step=SAVED_AT, position=8, data_hash="h"))
        state = state_of(engine) if recipe.precision.scaling == "delayed" else None
        return state, steps_of(engine, recipe, range(SAVED_AT, STEPS))


def load_and_go_on(rank: int, recipe: Recipe, world: int, folder: Path) -> Any:
    with engine_of(recipe, rank=rank, world=world) as engine:
        load_newest(engine, recipe, folder)
        state = state_of(engine) if recipe.precision.scaling == "delayed" else None
        return state, steps_of(engine, recipe, range(SAVED_AT, STEPS))


@pytest.mark.parametrize("params", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LOW)
def test_resume_is_bit_exact_under_every_recipe(name: str, params: str, tmp_path: Path) -> None:
    changes = {
        "precision.scaling": name,
        "precision.params": params,
        "precision.amax_history": 3,
        "run.microbatch_rows": 2,
    }
    saved = run_ranks(1, save_on_the_way, recipe_with(**changes), 1, tmp_path)[0]
    resumed = run_ranks(1, load_and_go_on, recipe_with(**changes), 1, tmp_path)[0]
    assert saved[1] == resumed[1]


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"parallel.tensor": 2}),
        (2, {"parallel.pipeline": 2}),
        (2, {}),
        (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
        (2, {"parallel.context": 2}),
    ],
    ids=["TP2", "PP2", "DP2", "TP2 SP PP2", "VP2", "CP2"],
)
def test_delayed_scales_come_along_to_another_layout(world: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """The saved scales arrive to the bit. What is trained on from there: the same, but for codes that the other order of
    sums tips over."""
    base = {"precision.scaling": "delayed", "precision.amax_history": 3, "run.microbatch_rows": 2}
    (state, numbers), *_ = run_ranks(1, save_on_the_way, recipe_with(**base), 1, tmp_path)
    results = run_ranks(world, load_and_go_on, recipe_with(**base, **changes), world, tmp_path)
    seen = set()
    for found, again in results:
        for key, (scale, history) in found.items():
            assert scale == state[key][0] and torch.equal(history, state[key][1]), key
            seen.add(key)
        assert again.losses == pytest.approx(numbers.losses, rel=2e-4)
        assert again.grad_norms == pytest.approx(numbers.grad_norms, rel=5e-3)
    assert seen == state.keys()


@pytest.mark.parametrize(("saved_as", "loaded_as"), [("none", "delayed"), ("delayed", "none"), ("current", "none")])
def test_another_backends_checkpoint_loads_with_fresh_scales(saved_as: str, loaded_as: str, tmp_path: Path) -> None:
    """Weights and optimizer state are loaded; state of one backend only is left out, with a warning."""
    base = {"run.microbatch_rows": 4, "precision.amax_history": 3}
    run_ranks(1, save_weights, recipe_with(**base, **{"precision.scaling": saved_as}), tmp_path)
    same, text = run_ranks(1, load_weights, recipe_with(**base, **{"precision.scaling": loaded_as}), tmp_path)[0]
    assert same and "scales and amax histories start fresh" in text


def save_weights(rank: int, recipe: Recipe, folder: Path) -> None:
    with engine_of(recipe, rank=rank, world=1) as engine:
        steps_of(engine, recipe, range(1))
        CheckpointFolder(folder, recipe.checkpoint).save(engine, RunState(step=1, position=4, data_hash="h"))
        torch.save([p.detach().clone() for p in engine.chunks[0].parameters()], folder / "weights.pt")


def load_newest(engine: Engine, recipe: Recipe, folder: Path) -> None:
    checkpoints = CheckpointFolder(folder, recipe.checkpoint)
    found = checkpoints.newest()
    assert found is not None
    checkpoints.load(engine, found[0])


def load_weights(rank: int, recipe: Recipe, folder: Path) -> tuple[bool, str]:
    import io
    import logging

    said = io.StringIO()
    logging.getLogger("train.checkpoint.storage").addHandler(logging.StreamHandler(said))
    with engine_of(recipe, rank=rank, world=1) as engine:
        load_newest(engine, recipe, folder)
        want = torch.load(folder / "weights.pt")
        same = all(torch.equal(p, w) for p, w in zip(engine.chunks[0].parameters(), want, strict=True))
        steps_of(engine, recipe, range(1, 2))
        return same, said.getvalue()


def final_state(rank: int, recipe: Recipe, world: int) -> Any:
    with engine_of(recipe, rank=rank, world=world) as engine:
        numbers = steps_of(engine, recipe, range(1))
        return state_of(engine), numbers


def test_amaxes_do_not_depend_on_how_a_step_is_cut() -> None:
    """One step from the same weights: every rank of every layout has the amax of the whole step."""
    base = {"precision.scaling": "delayed", "precision.amax_history": 2}
    (want, _), *_ = run_ranks(1, final_state, recipe_with(**base, **{"run.microbatch_rows": 4}), 1)
    assert all(min(scale) > 0 and 1.0 not in scale for scale, _ in want.values())
    for world, changes in ((1, {"run.microbatch_rows": 1}), (2, {}), (2, {"parallel.tensor": 2})):
        for found, _ in run_ranks(world, final_state, recipe_with(**base, **changes), world):
            for key, (scale, _) in found.items():
                assert scale == pytest.approx(want[key][0], rel=1e-2), (key, changes)


def test_layers_switched_to_high_precision_stay_so_after_a_resume(tmp_path: Path) -> None:
    changes = WIDE | {"precision.scaling": "blockwise"}
    (readings, _), _ = run_ranks(1, health, recipe_with(**changes), 1)[0]
    worst: dict[Any, float] = {}
    for r in readings:
        assert r.snr_db is not None
        worst[r.layer, r.linear] = min(r.snr_db, worst.get((r.layer, r.linear), math.inf))
    middle = sorted(worst.values())[len(worst) // 2]  # a floor that half of the layers miss
    changes |= {"precision.health_policy": "high_precision", "precision.health_floor_db": middle}
    saved = run_ranks(1, fall_back_and_save, recipe_with(**changes), tmp_path)[0]
    resumed = run_ranks(1, load_and_look, recipe_with(**changes), tmp_path)[0]
    assert any(saved[0]) and not all(saved[0])
    assert saved == resumed


def fall_back_and_save(rank: int, recipe: Recipe, folder: Path) -> Any:
    from tiny import microbatches

    from train.record.stopwatch import Stopwatch
    from train.step import train_step

    with engine_of(recipe, rank=rank, world=1) as engine:
        rows = microbatches(recipe, engine.mesh, 0)
        train_step(engine, rows, step=0, learning_rate=1e-3, watch=Stopwatch(), measure=True)
        engine.precision.health()
        CheckpointFolder(folder, recipe.checkpoint).save(engine, RunState(step=1, position=4, data_hash="h"))
        numbers = steps_of(engine, recipe, range(1, 3))
        return [linear.scaling is None for linear in engine.precision.linears], numbers


def load_and_look(rank: int, recipe: Recipe, folder: Path) -> Any:
    with engine_of(recipe, rank=rank, world=1) as engine:
        load_newest(engine, recipe, folder)
        numbers = steps_of(engine, recipe, range(1, 3))
        return [linear.scaling is None for linear in engine.precision.linears], numbers
