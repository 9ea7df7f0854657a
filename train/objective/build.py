"""Which objective a recipe trains: the one place that knows them all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.schema.recipe import Recipe
from recipes.schema.rules import check_objective
from train.checkpoint.manager import checkpoint_at
from train.distill import objective as distill
from train.distill.teacher import Teacher, identity, open_teacher
from train.distill.teacher_cache import KeptAnswers, read_request
from train.objective import next_token
from train.parallel.mesh import Mesh


@dataclass(frozen=True)
class Objective:
    """What Megatron's schedules call for a microbatch, and what it reports beside the loss."""

    forward_step: Callable[..., Any]
    parts: tuple[str, ...] = ()
    teacher: dict[str, Any] | None = None
    """Which weights teach (`train.distill.teacher.identity`), on every rank."""


def build_objective(recipe: Recipe, *, mesh: Mesh, chunks: list[Any], tokenizer: str | None) -> Objective:
    """The objective of a recipe; a teacher is built and loaded here. Collective over the world.

    chunks: the student's, unwrapped. tokenizer: fingerprint of the data's; None skips that check. Raises RecipeError,
    CheckpointError, BackendError.
    """
    check_objective(recipe)
    objective = recipe.objective
    if objective.kind == "next_token":
        return Objective(next_token.forward_step(mesh, reset_at_documents=recipe.data.reset_at_documents))
    source: Teacher | KeptAnswers | None
    if objective.teacher_cache is not None:
        request = read_request(Path(objective.teacher_cache))
        source = KeptAnswers.open(recipe, tokenizer=tokenizer) if mesh.is_last_stage else None
        step = distill.distill_step(recipe, mesh=mesh, source=source, match=None)
        return Objective(step, distill.PARTS, request.identity)
    source = open_teacher(recipe, mesh=mesh, tokenizer=tokenizer)
    layers = tuple(layer.layer_number - 1 for layer in chunks[-1].decoder.layers)
    match = distill.hidden_match(recipe, source, last_stage_layers=layers)
    assert objective.teacher is not None, "open_teacher has refused it"
    step = distill.distill_step(recipe, mesh=mesh, source=source, match=match)
    return Objective(step, distill.PARTS, identity(*checkpoint_at(objective.teacher)))
