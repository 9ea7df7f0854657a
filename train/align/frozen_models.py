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


def open_frozen_models(recipe: Recipe, *, mesh: Mesh, tokenizer: str, eod: int) -> FrozenModels:
    """Load the models that `objective.grpo` names. Collective over the world.

    Call it before a checkpoint's random state is restored: building a model draws random numbers. tokenizer, eod: fingerprint and
    end-of-document token of the run's tokenizer. Raises CheckpointError or RecipeError if one cannot be read, or has another
    tokenizer.
    """
    config = recipe.objective.grpo
    reference, rewards, lineage = None, None, {}
    if config.kl_weight:
        reference, lineage[REFERENCE] = _open_reference(recipe, mesh=mesh, tokenizer=tokenizer)
    if config.reward_model is not None:
        # One more token than a row: the scorer puts the end-of-document token before each text.
        rows = {"row_tokens": recipe.data.row_tokens + 1, "batch_rows": recipe.run.microbatch_rows}
        rewards = open_reward_model(config.reward_model, mesh=mesh, tokenizer=tokenizer, eod=eod, **rows)
        lineage[REWARD_MODEL] = identity_of(*checkpoint_at(config.reward_model))
    return FrozenModels(reference, rewards, lineage)


def check_frozen_models(frozen: FrozenModels, recipe: Recipe, *, before: Mapping[str, Any]) -> None:
    """CheckpointError if a model has other weights than the one that the run began with, unless the recipe allows it.

    before: the lineage of the checkpoint that the run continues from.
    """
    for name, identity in frozen.lineage.items():
        then = before.get(name)
        if then is None or then["fingerprint"] == identity["fingerprint"] or "arithmetic" in recipe.checkpoint.allow:
            continue
        raise CheckpointError(
            f"the {name.replace('_', ' ')} of this run was {then['checkpoint']} with weights {str(then['fingerprint'])[:12]}, "
            f"but objective.grpo now gives {identity['checkpoint']} with weights {str(identity['fingerprint'])[:12]}. Set "
            f"objective.grpo.{name} to the first one, or add checkpoint.allow=[arithmetic] to continue with the new one."
        )


def _open_reference(recipe: Recipe, *, mesh: Mesh, tokenizer: str) -> tuple[Any, dict[str, Any]]:
    """(frozen model, its identity). Errors: see `open_frozen_models`."""
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
    chunk = frozen_model(
        teacher_recipe(found.manifest, found.path),
        parallel=ParallelConfig(tensor=recipe.parallel.tensor),
        precision=replace(recipe.precision, fp8_weights=False, health=False),
        mesh=mesh,
        weights=found.path,
        row_tokens=recipe.data.row_tokens,
        reset_at_documents=True,
    )
    return chunk, identity_of(found.path, found.manifest)
