"""How many jobs a run will need: from its own record, or, before its first start on GPUs, from the plan.

    seconds of a step and of a save --> number of jobs, a suitable time limit, whether save_before_end_s is long enough

`stratum launch slurm --dry-run` prints this advice. It changes nothing.
"""

import math
from dataclasses import dataclass

from launch.plan.cost.device import device_named
from launch.plan.planner import make_plan
from launch.runs import RunFolder
from recipes.schema import units
from recipes.schema.errors import RecipeError
from recipes.schema.recipe import Recipe

START_S = 300.0
"""Seconds from the start of a job to its first step. An assumption, the same as in `stratum plan --goodput`."""


@dataclass(frozen=True)
class Pace:
    """Speed of a run."""

    step_s: float
    stop_s: float
    """Seconds from a signal to the end: the current step and a save."""
    source: str
    """Where the figures come from, for the text."""


def advice(recipe: Recipe, run: RunFolder, *, world: int, device: str) -> str:
    """The advice as text of a few lines, also if the time is unknown."""
    pace = _recorded(run) or _planned(recipe, world=world, device=device)
    if isinstance(pace, str):
        return pace
    slurm, left = recipe.launch.slurm, recipe.run.steps - run.checkpoint_step()
    seconds, limit = left * pace.step_s, 60.0 * slurm.time_limit_minutes
    useful = limit - slurm.save_before_end_s - START_S
    text = f"{pace.source}: {pace.step_s:.3g} s a step, {left:,} steps left: {units.span(seconds)}"
    minutes = 10 * math.ceil((1.25 * seconds + START_S + slurm.save_before_end_s) / 600)
    if minutes <= slurm.time_limit_minutes:
        text += (
            f". One job is enough. launch.slurm.time_limit_minutes={minutes} includes a reserve of 25 %; shorter jobs may "
            f"start sooner.\n"
        )
    elif useful <= 0:
        text += f". A job of {slurm.time_limit_minutes} minutes has no time for steps: raise launch.slurm.time_limit_minutes.\n"
    else:
        jobs, share = math.ceil(seconds / useful), 1 - useful / limit
        text += (
            f", about {jobs:,} jobs of {slurm.time_limit_minutes} minutes; starting ({START_S:.0f} s) and "
            f"launch.slurm.save_before_end_s take {share:.1%} of that time.\n"
        )
    need = 2 * pace.stop_s
    if need > slurm.save_before_end_s:
        text += (
            f"launch.slurm.save_before_end_s={slurm.save_before_end_s} is less than twice a step and a save "
            f"({need:.0f} s). Use launch.slurm.save_before_end_s={60 * math.ceil(need / 60)}.\n"
        )
    return text


def _recorded(run: RunFolder) -> Pace | None:
    """Speed of the run's last steps, including evaluations and saves; None if the record does not show it."""
    progress = run.progress()
    if progress is None or progress.seconds_left is None or not progress.total_steps:
        return None
    steps = progress.total_steps - progress.step
    if steps <= 0:
        return None
    return Pace(progress.seconds_left / steps, run.longest_stop_s(), "By the run's own record")


def _planned(recipe: Recipe, *, world: int, device: str) -> Pace | str:
    """Speed predicted by the plan, or a message that says why there is no prediction."""
    if not recipe.launch.gpus_per_node:
        return "Times on CPUs are not predicted. After some steps this shows the run's own speed.\n"
    kind = device_named(device)
    try:
        plan = make_plan(recipe, world=world, device=kind)
    except RecipeError as error:
        return f"This run cannot be planned: {error}\n"
    if plan.problems:
        problems = "".join(f"  {problem}\n" for problem in plan.problems)
        return f"On {kind.name}s (--device KIND for other GPUs) this run would fail:\n{problems}"
    save_s = plan.checkpoints.stall_s + plan.checkpoints.write_s
    return Pace(
        plan.time.seconds, plan.time.seconds + save_s, f"Predicted on {kind.name}s (--device KIND; docs/plan.md)"
    )
