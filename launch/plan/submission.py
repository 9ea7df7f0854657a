"""The plan of a run before it is submitted to a cluster, by Slurm's and Kubernetes' launchers."""

import sys

from launch.plan.cost.device import device_named
from launch.plan.planner import make_plan
from recipes.schema.errors import RecipeError
from recipes.schema.foreign import printable_lines
from recipes.schema.recipe import Recipe


def check_plan(recipe: Recipe, *, world: int, device: str, force: bool) -> None:
    """Plan a run on GPUs before it is submitted. Raises RecipeError with the plan's problems; with `force` only warns."""
    kind = device_named(device)
    problems = make_plan(recipe, world=world, device=kind).problems
    if not problems:
        return
    text = "".join(f"\n  {printable_lines(problem)}" for problem in problems)
    if not force:
        raise RecipeError(
            f"on {world} {kind.name} GPUs this run would fail:{text}\n`stratum plan` with the same words shows the plan; "
            f"--device KIND plans for other GPUs, --force submits anyway."
        )
    sys.stderr.write(f"warning: on {world} {kind.name} GPUs this run would fail (--force):{text}\n")
