"""What does not work with `E` layers yet, each refused by name. `recipes.schema.rules.problems` and the tools call these.

Rules between fields of `model.experts` are in `experts`, those of layouts in `layout`. docs/experts.md lists what is missing.
"""

from recipes.schema.errors import Problem
from recipes.schema.model import ModelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.recipe import Recipe
from recipes.schema.scaling import LINEARS, low_precision_linears, scalings_used


def expert_problems(recipe: Recipe) -> list[Problem]:
    """Objectives that do not work with `E` layers: a teacher has no expert groups, GRPO has not been tried."""
    kind = recipe.objective.kind
    if not has_experts(recipe.model) or kind not in ("distill", "grpo"):
        return []
    text = f"objective.kind={kind} does not support `E` layers (model.pattern={recipe.model.pattern})."
    dense = recipe.model.pattern.replace("E", "-")
    return [Problem("objective.kind", text, f"Use model.pattern={dense}, or objective.kind=next_token.")]


def expert_precision_problems(model: ModelConfig, precision: PrecisionConfig, *, backend: str) -> list[Problem]:
    """Number formats in which experts cannot multiply. backend: `rules.backend_name`, or the recipe's if that is not known."""
    if not has_experts(model):
        return []
    found, used = [], scalings_used(precision)
    if precision.quantize_weights != "none":
        name = precision.quantize_weights
        text = f"precision.quantize_weights={name} does not support `E` layers (model.pattern={model.pattern})."
        found.append(Problem("precision.quantize_weights", text, "Use quantize_weights=none."))
    low = any(name in LINEARS["E"] for names in low_precision_linears(model, precision).values() for name in names)
    if low and "delayed" in used:
        text = "precision.scaling=delayed has one history a linear layer, but each expert of an `E` layer would need its own."
        found.append(Problem("precision.scaling", text, "Use precision.scaling=current, or blockwise, mxfp8 or nvfp4."))
    if low and backend == "te":
        text = f"precision.scaling={'/'.join(used)}: on the te backend, experts of `E` layers multiply in high precision only."
        found.append(Problem("precision.scaling", text, "Use precision.scaling=none, or precision.backend=emulated."))
    return found


def dense_problems(model: ModelConfig, *, place: str, what: str, key: str) -> list[Problem]:
    """A model with `E` layers where a tool does not support them. place: the checkpoint; what: the tool; key: its field."""
    if not has_experts(model):
        return []
    text = f"{place} has `E` layers (model.pattern={model.pattern}), which {what} does not support."
    return [Problem(key, text, "Name a checkpoint of a model without experts.")]


def has_experts(model: ModelConfig) -> bool:
    """Whether a model has an `E` layer."""
    return "E" in model.pattern or (model.mtp.depths > 0 and "E" in model.mtp.pattern)
