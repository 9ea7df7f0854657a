"""What a run of GRPO needs in addition to training: the reference's weights, and the caches of the answers that it generates."""

from dataclasses import dataclass

from launch.plan.cost.inference import cache_bytes, cache_sizes
from launch.plan.cost.tensors import stage_tensors
from recipes.schema.layout import Layout
from recipes.schema.recipe import Recipe


@dataclass(frozen=True)
class RolloutBytes:
    """Bytes on each rank."""

    reference: float = 0.0
    """Weights of the reference of the KL term, counted as a model of the same shape."""
    caches: float = 0.0
    """Keys, values and states while answers are generated; released before the rows of a step are computed."""


def rollout_bytes(recipe: Recipe, layout: Layout) -> RolloutBytes:
    """Memory of `objective.kind: grpo`; nothing for other objectives. A reward model is not counted."""
    if recipe.objective.kind != "grpo":
        return RolloutBytes()
    config, model = recipe.objective.grpo, recipe.model
    size = 2 if recipe.precision.params == "bf16" else 4
    pattern = model.pattern.replace("|", "")
    tensors = stage_tensors(model, pattern, tensor=layout.tensor, is_first=True, is_last=True, low_layers=frozenset())
    weights = sum(one.numel * (4 if one.is_fp32 else size) for one in tensors)
    sizes = cache_sizes(
        model, rows=config.generation_rows, context_tokens=recipe.data.row_tokens, page_tokens=16, step_tokens=512,
        number_bytes=size, tensor=layout.tensor,
    )  # fmt: skip
    caches = cache_bytes(model, sizes, number_bytes=size, tensor=layout.tensor).total
    return RolloutBytes(weights if config.kl_weight else 0.0, caches)
