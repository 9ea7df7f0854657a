"""From Hydra's composed YAML to a typed Recipe, with every check that needs no device and no data.

    composed DictConfig --> plain mapping --> data.typed.build --> Recipe --> cross-field checks

Hydra decides what is composed; nothing of it goes further than this module and the entry points.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.typed import FieldError, build
from train.config import Recipe
from train.errors import RecipeError
from train.model.pattern import layer_kinds
from train.optim.schedule import check as check_schedule

_MAY_DIFFER = (
    "run.folder", "run.name", "run.steps", "run.microbatch_rows", "run.device", "run.threads", "run.stop_after_steps",
    "run.deterministic", "run.start_from", "objective.teacher_tensor", "objective.chunk_tokens", "parallel",
    "precision.backend", "precision.health", "precision.health_policy", "precision.health_floor_db",
    "checkpoint", "evaluate", "telemetry", "launch", "data.folder", "data.workers", "data.prefetch_steps",
    "data.read_threads", "data.cache", "data.verify", "data.stall_warning_s", "data.stall_limit_s",
    "generate", "model.mamba_chunk",
)  # fmt: skip
"""Fields a run may change when it resumes: they do not change which model is trained, on which rows, how."""


def read_recipe(composed: DictConfig) -> Recipe:
    """The typed recipe of a composed configuration. RecipeError lists everything that is wrong, one line each."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise RecipeError(f"the recipe does not resolve: {error}") from error
    assert isinstance(plain, dict)
    return recipe_from_mapping({str(key): value for key, value in plain.items()})


def recipe_from_mapping(plain: dict[str, Any]) -> Recipe:
    """The typed recipe of a plain mapping, as in `recipe.yaml` of a run folder."""
    plain = {key: value for key, value in plain.items() if key not in ("hydra", "generate")}
    try:
        recipe = build(Recipe, plain, "")
    except FieldError as error:
        raise RecipeError(str(error)) from error
    layer_kinds(recipe.model.pattern)
    check_schedule(
        recipe.schedule,
        total_steps=recipe.run.steps,
        tokens_per_step=recipe.run.global_rows * recipe.data.row_tokens,
    )
    if not recipe.data.sources:
        raise RecipeError("data.sources is empty. Name at least one source, e.g. data.sources.mine.path=texts/*.jsonl.")
    return recipe


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two resolved recipes disagree on that would make them different runs, one line each."""
    before, after = _flat(old), _flat(new)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == free or key.startswith(f"{free}.") for free in _MAY_DIFFER):
            continue
        if before.get(key) != after.get(key):
            lines.append(f"{key}: {before.get(key)} in the run's folder, {after.get(key)} now")
    return lines


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
