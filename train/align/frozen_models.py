"""The frozen models of GRPO, at the layout of training: the reference of the KL term, and a reward model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from recipes.schema.errors import CheckpointError, refuse
from recipes.schema.facts import identity_of, named
from recipes.schema.parallel import ParallelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_rules import tokenizer_problems
from train.align.score_answers import RewardScorer, open_reward_model
from train.checkpoint.manager import checkpoint_at
from train.distill.teacher import frozen_model, teacher_recipe
from train.parallel.mesh import Mesh

REFERENCE, REWARD_MODEL = "reference", "reward_model"
"""Keys of a checkpoint's lineage: the identities of these models (`recipes.schema.facts.identity_of`)."""


@dataclass(frozen=True)
class FrozenModels:
    """What a run needs in addition to the model that it trains."""

    reference: Any = None
    """An unwrapped chunk; None without a KL term."""
    rewards: RewardScorer | None = None
    """None if verifiers give the rewards."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Their identities, for checkpoints."""


def open_frozen_models(
    recipe: Recipe, *, mesh: Mesh, tokenizer: str, eod: int, before: Mapping[str, Any]
) -> FrozenModels:
    """Load the models that `objective.grpo` names. Collective over the world.

    tokenizer, eod: fingerprint and end-of-document token of the run's tokenizer. before: the lineage of a resumed run. Raises
    CheckpointError or RecipeError if one cannot be read, has another tokenizer, or is not the one that the run began with.
    """
    config = recipe.objective.grpo
    reference, rewards, lineage = None, None, {}
    if config.kl_weight:
        reference, identity = _open_reference(recipe, mesh=mesh, tokenizer=tokenizer, before=before.get(REFERENCE))
        lineage[REFERENCE] = identity
    if config.reward_model is not None:
        # One more token than a row: the scorer puts the end-of-document token before each text.
        rows = {"row_tokens": recipe.data.row_tokens + 1, "batch_rows": recipe.run.microbatch_rows}
        rewards = open_reward_model(config.reward_model, mesh=mesh, tokenizer=tokenizer, eod=eod, **rows)
        lineage[REWARD_MODEL] = identity_of(*checkpoint_at(config.reward_model))
        _check_same(
            recipe, "objective.grpo.reward_model", config.reward_model, lineage[REWARD_MODEL], before.get(REWARD_MODEL)
        )
    return FrozenModels(reference, rewards, lineage)


def _open_reference(
    recipe: Recipe, *, mesh: Mesh, tokenizer: str, before: Mapping[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """(frozen model, its identity). before: the identity that the run has recorded. Errors: see `open_frozen_models`."""
    config = recipe.objective.grpo
    key = "objective.grpo.reference" if config.reference is not None else "run.start_from"
    place = config.reference or recipe.run.start_from
    assert place is not None, "grpo_rules refuses a run without a start"
    found = named(place)
    if found.path is None or found.manifest is None:
        raise CheckpointError(f"{key}, the reference of the KL term: {found.error}")
    another = "name another objective.grpo.reference"
    refuse(
        tokenizer_problems(place, found.manifest.tokenizer, tokenizer, where=recipe.data.folder, otherwise=another),
        CheckpointError,
    )
    identity = identity_of(found.path, found.manifest)
    _check_same(recipe, key, place, identity, before)
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


def _check_same(
    recipe: Recipe, key: str, place: str, identity: Mapping[str, Any], before: Mapping[str, Any] | None
) -> None:
    """CheckpointError if a model has other weights than the one that the run has recorded, unless the recipe allows it."""
    if before is None or before["fingerprint"] == identity["fingerprint"] or "arithmetic" in recipe.checkpoint.allow:
        return
    raise CheckpointError(
        f"{key}={place} has weights {str(identity['fingerprint'])[:12]}, but this run began with {before['checkpoint']} with "
        f"weights {str(before['fingerprint'])[:12]}. Name that one, or add checkpoint.allow=[arithmetic] to continue with the "
        f"new one."
    )
