"""SIGKILL at random moments of a real run, during training and background saves: each kill leaves bitwise the old or the new
step, and the run ends as an uninterrupted one. `make test-slow` does it a hundred times."""

import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
from killed_runs import Contents, Kill, Run, contents_at, recipe_in

from recipes.schema import checkpoint_steps as steps
from train.checkpoint import offline

KEEP_ALL = 10_000


def undisturbed(run: Run) -> tuple[dict[int, float], dict[int, Contents]]:
    """Loss and checkpoint of each step of a run that ends by itself."""
    assert not run.attempt(None)
    losses = {line["step"]: line["loss"] for line in run.metrics if line["kind"] == "step"}
    return losses, {int(path.name[5:]): contents_at(path) for path in steps.steps_in(run.checkpoints)}


def next_kill(rng: random.Random, *, left: int, kills_left: int, world: int, step_s: float, start_s: float) -> Kill:
    """A random moment that spreads the remaining kills over the remaining steps."""
    rank = rng.choice([None, *range(world)])
    if rng.random() < 0.15:
        return Kill(None, rng.uniform(0, start_s), rank, rng.uniform(0, step_s))
    most = max(0, min(left - 1, round(2 * left / kills_left)))
    return Kill(rng.randint(0, most), rng.uniform(0, step_s), rank, rng.uniform(0, step_s))


@pytest.mark.slow
@pytest.mark.parametrize(("total", "kills"), [(8, 4), (200, 100)], ids=["four", "a hundred"])
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(total: int, kills: int, tmp_path: Path) -> None:
    world, rng, began = 2, random.Random(20261125), time.monotonic()
    recipe = recipe_in(tmp_path, steps_=total)
    keep_all = replace(recipe.checkpoint, keep_last=KEEP_ALL)
    whole = Run(
        replace(recipe, run=replace(recipe.run, name="whole"), checkpoint=keep_all),
        world,
        folder=tmp_path / "whole_said",
    )
    losses, contents = undisturbed(whole)
    assert sorted(losses) == sorted(contents) == list(range(1, total + 1))

    run = Run(recipe, world, folder=tmp_path / "killed_said")
    killed = newest = attempts = 0
    begins: list[int] = []
    step_s = 2 * statistics.median(line["step_s"] for line in whole.metrics if line["kind"] == "step")
    while killed < kills:
        kill = next_kill(rng, left=total - newest, kills_left=kills - killed, world=world, step_s=step_s, start_s=1.0)
        # Should the killer be late, the attempt pauses by itself instead of running to the end.
        stop = max(1, min(total - 1 - newest, (kill.steps or 0) + (3 if total - newest > 2 * (kills - killed) else 1)))
        attempts += 1
        assert attempts < 3 * kills, f"only {killed} of {attempts} attempts could be killed"
        run.recipe = replace(recipe, run=replace(recipe.run, stop_after_steps=stop))
        lines_before = len(run.metrics)
        killed += run.attempt(kill)
        lines = run.metrics

        new = lines[lines_before:]
        begins += [line["step"] for line in new if line["kind"] in ("start", "resume")]
        assert all(line["step"] == newest for line in new if line["kind"] in ("start", "resume")), (newest, new)
        told = max((line["step"] for line in lines if line["kind"] == "save"), default=0)
        trained = max((line["step"] for line in lines if line["kind"] == "step"), default=0)
        left = steps.steps_in(run.checkpoints)
        assert all(contents_at(path) == contents[int(path.name[5:])] for path in left)
        newest = int(left[-1].name[5:]) if left else 0
        assert told <= newest <= trained + 1, (told, newest, trained)
        assert not left or offline.verify(left[-1], lambda _: None) == []
    run.recipe = recipe
    run.attempt(None)

    lines = run.metrics
    wrong = [line["step"] for line in lines if line["kind"] == "step" and line["loss"] != losses[line["step"]]]
    assert not wrong, f"other losses than the undisturbed run's at steps {wrong}"
    assert {line["step"] for line in lines if line["kind"] == "step"} == set(losses)
    assert contents_at(run.checkpoints / steps.name_of(total)) == contents[total]
    trained_twice = sum(line["kind"] == "step" for line in lines) - total
    print(
        f"\n{killed} kills in {total} steps on {world} ranks: {len(set(begins))} different beginnings, {trained_twice} steps "
        f"trained again, {time.monotonic() - began:.0f} s"
    )
