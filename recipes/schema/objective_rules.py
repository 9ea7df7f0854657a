"""Rules of objectives: fields that one does not use, data that does not fit, and what goes with a scalar head.

`recipes.schema.rules.problems` calls them; commands that need a language model call `language_model_problems`.
"""

import dataclasses
from typing import Any

from recipes.schema.errors import Problem
from recipes.schema.model import ModelConfig
from recipes.schema.objective import PREFERENCE_OBJECTIVES, ObjectiveConfig
from recipes.schema.recipe import Recipe


def reward_problems(recipe: Recipe) -> list[Problem]:
    """An objective that does not fit the model's head, and tasks that need a language model."""
    kind, head, found = recipe.objective.kind, recipe.model.head, []
    if kind == "reward" and head != "scalar":
        text = f"objective.kind=reward trains a scalar head, but model.head={head}."
        found.append(Problem("model.head", text, "Set model.head=scalar."))
    if kind != "reward" and head == "scalar":
        text = f"model.head=scalar predicts no tokens, but objective.kind={kind} needs a distribution over tokens."
        found.append(Problem("model.head", text, "Set model.head=vocabulary, or objective.kind=reward."))
    if head == "scalar" and recipe.evaluate.tasks:
        text = f"evaluate.tasks={','.join(recipe.evaluate.tasks)} needs a language model, but model.head=scalar."
        remedy = "Set evaluate.tasks=[]: held-out preferences are scored in any case."
        found.append(Problem("evaluate.tasks", text, remedy))
    if head == "scalar" and recipe.evaluate.sample_prompts:
        text = "evaluate.sample_prompts needs a language model, but model.head=scalar."
        found.append(Problem("evaluate.sample_prompts", text, "Set evaluate.sample_prompts=[]."))
    return found


def mtp_objective_problems(recipe: Recipe) -> list[Problem]:
    """An objective that would leave the further depths of `model.mtp` without a gradient."""
    kind, depths = recipe.objective.kind, recipe.model.mtp.depths
    if not depths or kind == "next_token":
        return []
    text = f"model.mtp.depths={depths} is trained by objective.kind=next_token only, not by {kind}."
    remedy = (
        "Use model.mtp.depths=0. A run that starts from a model with further depths (run.start_from) leaves them out."
    )
    return [Problem("model.mtp.depths", text, remedy)]


def z_loss_problems(recipe: Recipe) -> list[Problem]:
    """A z-loss where nothing adds it."""
    objective, depths = recipe.objective, recipe.model.mtp.depths
    if not objective.z_loss or (objective.kind == "next_token" and not depths):
        return []
    where = f"model.mtp.depths={depths}" if objective.kind == "next_token" else f"objective.kind={objective.kind}"
    text = f"objective.z_loss={objective.z_loss:g} does nothing with {where}: only the loss of the next token alone has it."
    return [Problem("objective.z_loss", text, "Use objective.z_loss=0.")]


def without_mtp_problems(model: ModelConfig, *, place: str, what: str, key: str) -> list[Problem]:
    """A model with further depths where a tool does not support them. place: the checkpoint; what: the tool; key: its field."""
    if not model.mtp.depths:
        return []
    text = f"{place} predicts several tokens (model.mtp.depths={model.mtp.depths}), which {what} does not support."
    remedy = "Start a run from it with model.mtp.depths=0 (run.start_from, run.steps=1), and use that run."
    return [Problem(key, text, remedy)]


def data_fit_problems(recipe: Recipe) -> list[Problem]:
    """An objective that needs preferences without them, and preferences with another one."""
    kind, preferences = recipe.objective.kind, recipe.data.preferences
    found = []
    if preferences and kind not in PREFERENCE_OBJECTIVES:
        name = preferences[0]
        text = (
            f"objective.kind={kind}, but data.sources.{name} has preferences: it would learn the rejected answers like the "
            f"chosen ones."
        )
        remedy = (
            f"Use objective.kind={' or '.join(PREFERENCE_OBJECTIVES)}, or a source of the chosen answers (kind: chat)."
        )
        found.append(Problem("objective.kind", text, remedy))
    if not preferences and kind in PREFERENCE_OBJECTIVES:
        name = next(iter(recipe.data.sources), "NAME")
        text = f"objective.kind={kind} learns from preferences, and data.sources.{name} is not of kind preference."
        remedy = (
            "Use objective.kind=next_token, or sources that all have kind: preference. A recipe leaves out the sources that it "
            "inherits with data/no_sources before _self_ in its defaults."
        )
        found.append(Problem("objective.kind", text, remedy))
    return found


def dpo_problems(recipe: Recipe) -> list[Problem]:
    """DPO without a reference."""
    if recipe.objective.kind != "dpo" or recipe.objective.dpo.reference or recipe.run.start_from:
        return []
    text = "objective.kind=dpo compares answers with a reference, but objective.dpo.reference=null and run.start_from=null."
    remedy = "Set run.start_from=runs/NAME, the run of the model to improve, or objective.dpo.reference."
    return [Problem("objective.dpo.reference", text, remedy)]


def language_model_problems(model: ModelConfig, *, place: str, key: str = "model.head") -> list[Problem]:
    """A reward model where a language model is needed. place: the checkpoint or run; key: the field that names it."""
    if model.head == "vocabulary":
        return []
    text = f"{place} is a reward model (model.head=scalar): it gives a text one number and predicts no tokens."
    return [Problem(key, text, "Name a language model, such as the one that it started from (run.start_from).")]


def unused(objective: ObjectiveConfig) -> str:
    """Fields of an objective that are set but not used, for messages; empty if all are used.

    A section belongs to the kind of its name, `z_loss` to `next_token`, all other fields to `distill`.
    """
    found: list[str] = []
    for field in dataclasses.fields(objective):
        value, default = getattr(objective, field.name), getattr(ObjectiveConfig(), field.name)
        owner = field.name if dataclasses.is_dataclass(value) else _OWNERS.get(field.name, "distill")
        if field.name != "kind" and owner != objective.kind:
            found += _changed(f"objective.{field.name}", value, default)
    return ", ".join(found)


_OWNERS = {"z_loss": "next_token"}


def _changed(key: str, value: Any, default: Any) -> list[str]:
    if not dataclasses.is_dataclass(value):
        return [f"{key}={value}"] * (value != default)
    names = [field.name for field in dataclasses.fields(value)]
    return [text for name in names for text in _changed(f"{key}.{name}", getattr(value, name), getattr(default, name))]
