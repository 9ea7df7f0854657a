"""Which objective a recipe trains: the one place that knows them all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.config import Recipe
from train.errors import RecipeError
from train.objective import distill, next_token
from train.objective.kept import KeptAnswers
from train.objective.teacher import Teacher, open_teacher
from train.parallel.mesh import Mesh


@dataclass(frozen=True)
class Objective:
    """What Megatron's schedules call for a microbatch, and what it reports beside the loss."""

    forward_step: Callable[..., Any]
    parts: tuple[str, ...] = ()


def build_objective(recipe: Recipe, *, mesh: Mesh, chunks: list[Any], tokenizer: str | None) -> Objective:
    """The objective of a recipe; a teacher is built and loaded here. Collective over the world.

    chunks: the student's, unwrapped. tokenizer: fingerprint of the data's; None skips that check. Raises RecipeError,
    CheckpointError, BackendError.
    """
    objective = recipe.objective
    if objective.kind == "next_token":
        return Objective(next_token.forward_step(mesh, reset_at_documents=recipe.data.reset_at_documents))
    source: Teacher | KeptAnswers | None
    if objective.teacher_cache is not None:
        if objective.hidden_match != "none":
            raise RecipeError(
                f"objective.hidden_match={objective.hidden_match} needs the teacher itself; objective.teacher_cache holds "
                f"its answers only. Use hidden_match=none, or teacher_cache=null."
            )
        source = KeptAnswers.open(recipe, tokenizer=tokenizer) if mesh.is_last_stage else None
        return Objective(distill.distill_step(recipe, mesh=mesh, source=source, match=None), distill.PARTS)
    source = open_teacher(recipe, mesh=mesh, tokenizer=tokenizer)
    layers = tuple(layer.layer_number - 1 for layer in chunks[-1].decoder.layers)
    match = distill.hidden_match(recipe, source, last_stage_layers=layers)
    return Objective(distill.distill_step(recipe, mesh=mesh, source=source, match=match), distill.PARTS)
