"""Background saves write bitwise the state at the request, although the optimizer changes it meanwhile."""

import hashlib
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crashes import SMALL, acts_of_saves
from ranks import run_ranks
from tiny import engine_of, recipe_with, steps_of

from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.checkpoint.stale import MIN_ELEMENTS


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}


def both_ways(rank: int, recipe: Recipe, world: int, folder: Path) -> tuple[float, list[str]]:
    """Save step 1 and wait; then save the same state in the background, with writing delayed, while three steps run.

    -> how long the loop was blocked, and the kinds of events in order.
    """
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(1))
        CheckpointFolder(folder / "waited", recipe.checkpoint).save(engine, RunState(step=1, position=4, data_hash="h"))
        checkpoints = CheckpointFolder(folder / "background", recipe.checkpoint)
        released = threading.Event()
        with acts_of_saves(lambda act: act.name == "writev" and released.wait(60)):
            started = time.perf_counter()
            checkpoints.request(engine, RunState(step=1, position=4, data_hash="h"))
            held = time.perf_counter() - started
            kinds = [event.kind for event in checkpoints.collect()]
            for step in range(1, 4):
                steps_of(engine, recipe, range(step, step + 1), before_update=checkpoints.before_update)
                kinds += [event.kind for event in checkpoints.collect()]
            assert checkpoints.is_writing, "three steps were to fit into the writing"
            released.set()
            checkpoints.wait()
        kinds += [event.kind for event in checkpoints.collect()]
        assert checkpoints.saved_step == 1 and checkpoints.collect() == []
        return held, kinds


@pytest.mark.parametrize(
    ("world", "changes"),
    [(1, {"precision.params": "bf16"}), (2, {}), (2, {"parallel.tensor": 2, "precision.scaling": "delayed"})],
    ids=["one bf16", "DP2", "TP2 delayed"],
)
def test_background_bytes_are_the_waited_ones(world: int, changes: dict[str, object], tmp_path: Path) -> None:
    recipe = recipe_with(**changes)
    results = run_ranks(world, both_ways, recipe, world, tmp_path)
    waited, background = (digests(tmp_path / way / "step_00000001") for way in ("waited", "background"))
    assert len(waited) == world and waited == background
    for _held, kinds in results:
        assert kinds == ["save_requested", "save_staged", "save"]


def unstaged(rank: int, folder: Path) -> list[bool]:
    """The optimizer may not update before the copy is made: staging is delayed, and the update waits for it."""
    from train.checkpoint import fingerprint

    with engine_of(SMALL, rank=rank, world=1) as engine:
        steps_of(engine, SMALL, range(1))
        weight = next(p for p in engine.chunks[0].module.parameters() if p.numel() >= MIN_ELEMENTS)
        before = weight.detach().clone()
        checkpoints = CheckpointFolder(folder, SMALL.checkpoint)
        real = fingerprint.of_box
        fingerprint.of_box = lambda *a, **k: (time.sleep(0.02), real(*a, **k))[1]
        checkpoints.request(engine, RunState(step=1, position=4, data_hash="h"))
        seen = []

        def note() -> None:
            seen.append(torch.equal(weight, before))
            checkpoints.before_update()
            seen.append(checkpoints._save is not None and checkpoints._save.staged.is_set())

        steps_of(engine, SMALL, range(1, 2), before_update=note)
        fingerprint.of_box = real
        checkpoints.wait()
        checkpoints.check()
        return [*seen, not torch.equal(weight, before)]


def test_the_update_waits_for_the_copy(tmp_path: Path) -> None:
    assert run_ranks(1, unstaged, tmp_path) == [[True, True, True]]


def no_threads_left(rank: int, folder: Path) -> int:
    with engine_of(SMALL, rank=rank, world=1) as engine:
        checkpoints = CheckpointFolder(folder, replace(SMALL.checkpoint, keep_last=1))
        for step in range(3):
            steps_of(engine, SMALL, range(step, step + 1), before_update=checkpoints.before_update)
            checkpoints.request(engine, RunState(step=step + 1, position=0, data_hash="h"))
        checkpoints.wait()
        time.sleep(0.1)
        return sum(thread.name.startswith("save of") for thread in threading.enumerate())


def test_one_save_at_a_time_and_no_thread_stays(tmp_path: Path) -> None:
    assert run_ranks(1, no_threads_left, tmp_path) == [0]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step_00000003"]
