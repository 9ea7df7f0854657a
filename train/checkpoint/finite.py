"""Find the newest checkpoint without NaN or infinity, and advise what to do when a run produced them."""

from pathlib import Path

from recipes.schema.checkpoint_steps import candidates
from recipes.schema.errors import CheckpointError
from recipes.schema.recipe import Recipe
from train.checkpoint.files import Reader


def newest_finite(folder: Path) -> Path | None:
    """The newest whole checkpoint without NaN or infinity; None without one.

    Older versions did not count NaN and infinity in the manifest: then this reads the tensors. Raises CheckpointError if the
    folder cannot be read.
    """
    for path, manifest in candidates(folder)[0]:
        try:
            reader = Reader(path) if any(record.not_finite is None for record in manifest.tensors.values()) else None
            if reader is None or not any(reader.sums(name).not_finite for name in manifest.tensors):
                return path
        except CheckpointError:
            continue
    return None


def remedies_of(recipe: Recipe) -> str:
    """What to change in a recipe whose run gave NaN or infinity, the weights of its losses first."""
    objective = recipe.objective
    weights = {"grpo": ("grpo.kl_weight", objective.grpo.kl_weight), "dpo": ("dpo.beta", objective.dpo.beta)}
    key, weight = weights.get(objective.kind, ("", 0.0))
    found = [f"a lower objective.{key} (it is {weight:g})"] if weight else []
    found += [f"a lower optim.lr (it is {recipe.optim.lr:g})", "a longer schedule.warmup"]
    found += ["optim.clip_norm=1"] if recipe.optim.clip_norm != 1 else []
    found += ["precision.params=fp32"] if recipe.precision.params != "fp32" else []
    return f"{', '.join(found[:-1])} or {found[-1]}"


def advice_after_not_finite(folder: Path, *, remedies: str) -> str:
    """Advice after NaN or infinity in a run with these checkpoints, in one or two sentences. Never raises.

    remedies: `remedies_of` the run's recipe.
    """
    try:
        newest = newest_finite(folder)
    except CheckpointError as error:
        return f"({error})"
    remedy = "No earlier checkpoint without them exists: start again"
    if newest is not None:
        remedy = f"{newest.name} is the newest finite checkpoint: continue from it (checkpoint.allow=[arithmetic])"
    return f"{remedy} with {remedies}."
