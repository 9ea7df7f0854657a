"""What alignment needs in addition to training: frozen models, caches of generated answers, and the rows of a step of GRPO."""

from dataclasses import dataclass, replace
from pathlib import Path

from launch.plan.cost.inference import cache_bytes, cache_sizes
from launch.plan.cost.tensors import stage_tensors
from launch.plan.teacher import model_named
from recipes.schema.layout import Layout
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe


@dataclass(frozen=True)
class AlignmentCost:
    """Bytes on each rank."""

    frozen: tuple[float, ...]
    """By pipeline stage: weights of the reference, which has the shape of the model that trains, and of the reward model, both at
    the layout of training."""
    caches: float = 0.0
    """Keys, values and states while answers are generated; released before the rows of a step are computed."""
    notes: tuple[str, ...] = ()


def alignment_cost(recipe: Recipe, layout: Layout, *, stages: tuple[str, ...]) -> AlignmentCost:
    """Memory of `objective.kind: grpo`, and of an `online` reference of `dpo`; nothing for other objectives.

    stages: pattern of each model chunk, in layer order.
    """
    objective, model = recipe.objective, recipe.model
    size = 2 if recipe.precision.params == "bf16" else 4
    if objective.kind == "dpo" and objective.dpo.reference_log_probs == "online":
        held = [0.0] * layout.pipeline
        for number, chunk in enumerate(stages):
            ends = {"is_first": number == 0, "is_last": number == len(stages) - 1}
            held[number % layout.pipeline] += _weights(model, chunk, size=size, tensor=layout.tensor, **ends)
        return AlignmentCost(tuple(held))
    if objective.kind != "grpo":
        return AlignmentCost((0.0,) * layout.pipeline)
    config, notes = objective.grpo, []
    frozen = _weights(model, model.pattern, size=size, tensor=layout.tensor) if config.kl_weight else 0.0
    if config.reward_model is not None:
        path = Path(config.reward_model)
        judge, where = model_named(path)
        if judge is None:
            notes.append(
                f"objective.grpo.reward_model={path} is not on this disk, and no recipe is named {path.name}: the reward "
                f"model's memory is not in this plan."
            )
        else:
            frozen += _weights(judge, judge.pattern, size=size, tensor=layout.tensor)
            if where is not None:
                notes.append(
                    f"objective.grpo.reward_model={path} is not on this disk: the reward model is planned as {where}."
                )
    sizes = cache_sizes(
        model, rows=config.generation_rows, context_tokens=recipe.data.row_tokens, page_tokens=16, step_tokens=512,
        number_bytes=size, tensor=layout.tensor,
    )  # fmt: skip
    caches = cache_bytes(model, sizes, number_bytes=size, tensor=layout.tensor).total
    notes.append(
        f"objective.kind=grpo: the time of a step is that of the update, with answers of objective.grpo.max_answer_tokens="
        f"{config.max_answer_tokens:,} tokens. Drawing and judging answers, and reading them with the policy, the reference and "
        f"the reward model, take further time."
    )
    return AlignmentCost((frozen,) * layout.pipeline, caches, tuple(notes))


def with_rows_of_answers(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe with the rows of a step of GRPO in `run.global_rows`, if every answer has `max_answer_tokens`; other recipes
    unchanged. Training does not read `run.global_rows`: the rows of a step follow from the answers."""
    if recipe.objective.kind != "grpo":
        return recipe
    config = recipe.objective.grpo
    answers_of_row = max(1, recipe.data.row_tokens // (config.max_answer_tokens + 1))  # a prompt has at least one token
    rows = -(-config.prompts_per_step * config.generations_per_prompt // answers_of_row)
    each = recipe.run.microbatch_rows * layout.data
    return replace(recipe, run=replace(recipe.run, global_rows=-(-rows // each) * each))


def _weights(
    model: ModelConfig, pattern: str, *, size: int, tensor: int, is_first: bool = True, is_last: bool = True
) -> float:
    """Bytes of the weights of one tensor rank."""
    tensors = stage_tensors(model, pattern.replace("|", ""), tensor=tensor, is_first=is_first, is_last=is_last)
    return float(sum(one.numel * (4 if one.is_fp32 else size) for one in tensors))
