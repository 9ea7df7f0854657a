"""Rules of `run.spikes` and `run.integrity`: problems that the recipe alone shows. `recipes.schema.rules.problems` calls them."""

from recipes.schema.errors import Problem
from recipes.schema.recipe import Recipe


def spike_problems(recipe: Recipe) -> list[Problem]:
    """Problems of going back after a spike; [] for other policies."""
    if recipe.run.spikes.policy != "rollback":
        return []
    found = []
    if recipe.objective.kind in ("grpo", "dpo"):
        text = (
            f"run.spikes.policy=rollback leaves rows of prepared data out; objective.kind={recipe.objective.kind} has numbers of "
            f"its own for each row or prompt, which cannot be left out."
        )
        found.append(Problem("run.spikes.policy", text, "Use run.spikes.policy=skip."))
    if recipe.objective.kind == "distill" and recipe.objective.teacher_cache is not None:
        text = "run.spikes.policy=rollback replaces rows by later ones, for which objective.teacher_cache has no teacher logits."
        found.append(Problem("run.spikes.policy", text, "Use run.spikes.policy=skip."))
    if recipe.checkpoint.every_steps == 0 or recipe.checkpoint.every_steps >= recipe.run.steps > 1:
        text = (
            f"run.spikes.policy=rollback with checkpoint.every_steps={recipe.checkpoint.every_steps}: a spike would cost all "
            f"steps since the start."
        )
        remedy = f"Set checkpoint.every_steps below run.steps={recipe.run.steps:,}."
        found.append(Problem("checkpoint.every_steps", text, remedy))
    return found


def integrity_problems(recipe: Recipe) -> list[Problem]:
    """Checks for silent corruption that are configured but turned off."""
    config = recipe.run.integrity
    chosen = {"products": list(config.products), "collectives": config.collectives}
    found = [
        Problem(
            f"run.integrity.{name}",
            f"run.integrity.{name}={str(value).lower()} has no effect, because run.integrity.enabled=false.",
            "Set run.integrity.enabled=true.",
        )
        for name, value in chosen.items()
        if value and not config.enabled
    ]
    return found
