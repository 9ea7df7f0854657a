"""Runs of GRPO that are killed: in rollouts, judging, the update and a save. They end bit for bit as an undisturbed one, and the
rewards that a batch had before the kill are its rewards after it."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed_runs import Run, contents_at, run_once
from policy_runs import policy_recipe, prompts_in, write_start
from ranks import run_ranks, start_ranks

from recipes.schema.recipe import Recipe
from train import step as one_step
from train.align import judging, policy_stream
from train.checkpoint import publishing

STEPS = 5
OPTIONS = {
    "run.steps": STEPS, "objective.grpo.updates_per_batch": 2, "objective.grpo.off_policy_steps": 1,
    "objective.grpo.importance_cap": 2.0, "checkpoint.background": False,
}  # fmt: skip
PLACES: dict[str, tuple[Any, str, int]] = {
    "rollout": (policy_stream, "draw_answers", 2),
    "judging": (judging.Judges, "_write", 3),
    "update": (one_step, "set_learning_rate", 4),
    "third update": (one_step, "set_learning_rate", 3),
    "save": (publishing, "publish_step", 3),
}
"""Where to kill: the function, and at which call of it."""


def killed(rank: int, recipe: Recipe, output: Path, place: str) -> None:
    """A run that kills itself in the middle of a function."""
    owner, name, call = PLACES[place]
    real, calls = getattr(owner, name), []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(owner, name, wrapped)
    run_once(rank, recipe, output)


def made(folder: Path, **changes: Any) -> Recipe:
    """A recipe with its prompts and its start."""
    prompts_in(folder, **({"function": changes.pop("function")} if "function" in changes else {}))
    recipe = policy_recipe(folder, **(OPTIONS | changes))
    run_ranks(1, write_start, recipe)
    return recipe


def run_of(recipe: Recipe, name: str, *, place: str | None = None) -> Run:
    """The whole run, after a kill at `place`."""
    run = Run(replace(recipe, run=replace(recipe.run, name=name)), 1, folder=Path(recipe.run.folder) / f"said {name}")
    if place is not None:
        said = Path(recipe.run.folder) / f"said {name}"
        (pid,) = start_ranks(1, killed, run.recipe, said / "output", place, folder=said)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, (said / "output").read_text()
    run.attempt(None)
    return run


def end_of(run: Run) -> tuple[dict[int, Any], dict[str, str]]:
    """Losses and norms by step, and the last checkpoint's content."""
    steps = {line["step"]: (line["loss"], line["grad_norm"]) for line in run.metrics if line["kind"] == "step"}
    assert sorted(steps) == list(range(1, STEPS + 1))
    return steps, contents_at(run.checkpoints / f"step_{STEPS:08d}")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rollout", "judging", "update", "save"])
def test_a_killed_run_ends_bit_for_bit_as_an_undisturbed_one(tmp_path: Path, place: str) -> None:
    recipe = made(tmp_path)
    undisturbed, again = run_of(recipe, "undisturbed"), run_of(recipe, "killed", place=place)
    assert end_of(undisturbed) == end_of(again)


def test_rewards_before_a_kill_are_the_rewards_after_it(tmp_path: Path) -> None:
    """The verifier gives another number at every call, as one does whose time limit depends on the clock."""
    options = {"objective.grpo.updates_per_batch": 1, "objective.grpo.off_policy_steps": 0, "run.steps": 3}
    run = run_of(
        made(tmp_path, function="tests.reward_functions:random_reward", **options), "killed", place="third update"
    )
    means = [line["reward_mean"] for line in run.metrics if line["kind"] == "rollouts" and line["step"] == 3]
    assert len(means) == 2 and means[0] == means[1]
