"""How long a run will take on a cluster, in jobs: from its own record, or, on GPUs, from the plan before it ever ran.

    seconds of a step and of a save --> jobs of the recipe's time limit; the limit that suits; is save_before_end_s enough?

Advice for `stratum launch slurm --dry-run`; nothing is changed by it.
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
"""From the start of a job to its first step: an allowance, as `plan --goodput` has it."""


@dataclass(frozen=True)
class Pace:
    """What a run does in a second, and who says so."""

    step_s: float
    stop_s: float
    """From the signal to the end: the step under way and a save."""
    source: str


def advice(recipe: Recipe, run: RunFolder, *, world: int, device: str) -> str:
    """A few lines for a person; what cannot be known is said."""
    pace = _recorded(run) or _planned(recipe, world=world, device=device)
    if isinstance(pace, str):
        return pace
    slurm, left = recipe.launch.slurm, recipe.run.steps - run.checkpoint_step()
    seconds, limit = left * pace.step_s, 60.0 * slurm.time_limit_minutes
    useful = limit - slurm.save_before_end_s - START_S
    text = f"{pace.source}: {pace.step_s:.3g} s a step, {left:,} steps left: {units.span(seconds)}"
    minutes = 10 * math.ceil((1.25 * seconds + START_S + slurm.save_before_end_s) / 600)
    if minutes <= slurm.time_limit_minutes:
        text += f". One job does it; launch.slurm.time_limit_minutes={minutes} leaves a quarter to spare and may start sooner.\n"
    elif useful <= 0:
        text += f". A job of {slurm.time_limit_minutes} minutes has no time for steps: raise launch.slurm.time_limit_minutes.\n"
    else:
        jobs, share = math.ceil(seconds / useful), 1 - useful / limit
        text += (
            f", some {jobs:,} jobs of {slurm.time_limit_minutes} minutes, of which starting ({START_S:.0f} s) and "
            f"launch.slurm.save_before_end_s take {share:.1%}.\n"
        )
    need = 2 * pace.stop_s
    if need > slurm.save_before_end_s:
        text += (
            f"launch.slurm.save_before_end_s={slurm.save_before_end_s} is short of twice a step and a save "
            f"({need:.0f} s). Use launch.slurm.save_before_end_s={60 * math.ceil(need / 60)}.\n"
        )
    return text


def _recorded(run: RunFolder) -> Pace | None:
    """The pace of the run's last steps, evaluations and saves included."""
    progress = run.progress()
    if progress is None or progress.seconds_left is None or not progress.total_steps:
        return None
    steps = progress.total_steps - progress.step
    if steps <= 0:
        return None
    return Pace(progress.seconds_left / steps, run.longest_stop_s(), "By the run's own record")


def _planned(recipe: Recipe, *, world: int, device: str) -> Pace | str:
    """The plan's prediction; or why there is none."""
    if not recipe.launch.gpus_per_node:
        return "How long it takes is not predicted for CPUs; after some steps the run's own record says it here.\n"
    kind = device_named(device)
    try:
        plan = make_plan(recipe, world=world, device=kind)
    except RecipeError as error:
        return f"It cannot be planned: {error}\n"
    if plan.problems:
        problems = "".join(f"  {problem}\n" for problem in plan.problems)
        return f"Planned on {kind.name}s (--device KIND names others), this run would fail:\n{problems}"
    save_s = plan.checkpoints.stall_s + plan.checkpoints.write_s
    return Pace(
        plan.time.seconds, plan.time.seconds + save_s, f"Predicted on {kind.name}s (--device KIND; docs/plan.md)"
    )
