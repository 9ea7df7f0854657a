"""What a recipe's objective asks for that cannot be, or would do nothing. Standard library only: planning looks too."""

import dataclasses

from recipes.schema.errors import RecipeError
from recipes.schema.objective import ObjectiveConfig
from recipes.schema.recipe import Recipe


def objective_problems(recipe: Recipe) -> list[str]:
    """Everything about an objective that a recipe alone tells is wrong, one sentence each."""
    objective = recipe.objective
    if objective.kind != "distill":
        return []
    problems = []
    if objective.teacher is None and objective.teacher_cache is None:
        problems.append(
            "objective.kind=distill needs objective.teacher, a checkpoint folder or a run folder such as runs/NAME, or "
            "objective.teacher_cache, what `stratum teacher-cache` wrote."
        )
    if objective.top_k > recipe.model.vocab:
        problems.append(
            f"objective.top_k={objective.top_k} is more than the vocabulary, model.vocab={recipe.model.vocab}. Use 0 for the "
            f"whole distribution, or fewer tokens."
        )
    if objective.hidden_match == "none":
        problems += _without_match(objective)
    elif objective.teacher_cache is not None:
        problems.append(
            f"objective.hidden_match={objective.hidden_match} needs the teacher itself; objective.teacher_cache holds its "
            f"answers only. Use hidden_match=none, or teacher_cache=null."
        )
    elif objective.hidden_layers != "final" and recipe.parallel.recompute != "none":
        problems.append(
            f"objective.hidden_layers={objective.hidden_layers} needs activations that parallel.recompute="
            f"{recipe.parallel.recompute} throws away. Use hidden_layers=final, or parallel.recompute=none."
        )
    return problems


def check_objective(recipe: Recipe) -> None:
    """RecipeError with all `objective_problems`."""
    problems = objective_problems(recipe)
    if problems:
        raise RecipeError("\n".join(problems))


def unused(objective: ObjectiveConfig) -> str:
    """Fields that are set and not looked at, for people; empty where there are none."""
    if objective.kind != "next_token":
        return ""
    plain = ObjectiveConfig()
    names = [field.name for field in dataclasses.fields(objective) if field.name != "kind"]
    said = [name for name in names if getattr(objective, name) != getattr(plain, name)]
    return ", ".join(f"objective.{name}={getattr(objective, name)}" for name in said)


def _without_match(objective: ObjectiveConfig) -> list[str]:
    problems = []
    if not objective.distill_weight:
        problems.append(
            "objective.distill_weight=0 with hidden_match=none leaves nothing to learn from the teacher. Use "
            "objective=next_token to train without one."
        )
    for name, value, default in (
        ("hidden_layers", objective.hidden_layers, "final"),
        ("hidden_weight", objective.hidden_weight, None),
    ):
        if value != default:
            problems.append(
                f"objective.{name}={value} does nothing while objective.hidden_match=none. Use hidden_match=cosine or mse, or "
                f"leave {name} at {'null' if default is None else default}."
            )
    return problems
