"""The reference of the KL term: a frozen copy of the model as it was before, at the layout of training."""

from dataclasses import replace
from typing import Any

from recipes.schema.errors import CheckpointError, refuse
from recipes.schema.facts import identity_of, named
from recipes.schema.parallel import ParallelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_rules import tokenizer_problems
from train.distill.teacher import frozen_model, teacher_recipe
from train.parallel.mesh import Mesh

REFERENCE = "reference"
"""Key of a checkpoint's lineage."""


def open_reference(
    recipe: Recipe, *, mesh: Mesh, tokenizer: str, before: dict[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """(frozen model, its identity) of the reference. Collective over the world.

    tokenizer: fingerprint of the run's. before: the identity that a resumed run has recorded. Raises CheckpointError if it cannot
    be read, has another tokenizer, or is not the recorded one.
    """
    config = recipe.objective.grpo
    field = "objective.grpo.reference" if config.reference is not None else "run.start_from"
    place = config.reference or recipe.run.start_from
    assert place is not None, "grpo_rules refuses a run without a start"
    found = named(place)
    if found.path is None or found.manifest is None:
        raise CheckpointError(f"{field}, the reference of the KL term: {found.error}")
    another = "name another objective.grpo.reference"
    refuse(
        tokenizer_problems(place, found.manifest.tokenizer, tokenizer, where=recipe.data.folder, otherwise=another),
        CheckpointError,
    )
    identity = identity_of(found.path, found.manifest)
    if (
        before is not None
        and before["fingerprint"] != identity["fingerprint"]
        and "arithmetic" not in recipe.checkpoint.allow
    ):
        raise CheckpointError(
            f"{field}={place} has weights {identity['fingerprint'][:12]}, but the reference of this run is "
            f"{before['checkpoint']} with weights {str(before['fingerprint'])[:12]}. Set objective.grpo.reference to it, or add "
            f"checkpoint.allow=[arithmetic] to continue with the new one."
        )
    chunk = frozen_model(
        teacher_recipe(found.manifest, found.path),
        parallel=ParallelConfig(tensor=recipe.parallel.tensor),
        precision=replace(recipe.precision, fp8_weights=False, health=False),
        mesh=mesh,
        weights=found.path,
        row_tokens=recipe.data.row_tokens,
        reset_at_documents=True,
    )
    return chunk, identity
