"""Predicted peak memory of a published run: the weights, gradients and optimizer state of its program, and activations.

The two programs with published peaks keep other state than this project (below) and have another loss. Activations of layers
are those of `launch.plan.cost.activations`. Only `UNUSABLE` is fitted.
"""

from dataclasses import replace

from launch.plan.cost.activations import Shape, hidden_bytes, layer_bytes
from launch.plan.cost.memory import rank_memory
from launch.plan.cost.tensors import stage_tensors
from launch.plan.published.rows import Published
from recipes.schema.parallel import ParallelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.units import GIB

UNUSABLE = 1.05
"""Memory that the allocator reserves, relative to what it has allocated."""
KEPT_BY_SELECTION = 0.36
"""Share of a layer's activations that torchtitan's selective checkpointing keeps: its input, the attention output and the
result of every second product (of Llama 3 8B: 31,744 of 89,088 numbers a token)."""

LOSS_EAGER, LOSS_COMPILED = 13, 5
"""Bytes for each logit while torchtitan's loss runs: 2 as computed, 4 cast, 4 for log-probabilities and gradient, 3 of slack;
compiled, the cast and the log-probabilities are never stored (8 bytes less)."""


def published_memory(found: Published) -> float | None:
    """Predicted GiB of the fullest rank; None if the row does not have enough information."""
    setting, layout = found.setting, found.setting.layout
    software = setting.software.name
    if software == "llm-foundry" or (software == "torchtitan" and not found.recompute_published):
        return None
    if software not in ("torchtitan", "nanotron"):
        return _on_megatron(found)
    shape = Shape(
        model=setting.model,
        modules="te",
        size=2,
        rows=setting.rows,
        sequence=setting.sequence,
        tensor=layout.tensor,
        context=layout.context,
        split_sequence=setting.split_sequence,
    )
    worst = 0.0
    for stage in range(layout.pipeline):
        patterns = [setting.stages[i] for i in range(stage, len(setting.stages), layout.pipeline)]
        is_last = stage == layout.pipeline - 1
        numel = sum(
            sum(one.numel for one in stage_tensors(
                setting.model, pattern, tensor=layout.tensor, is_first=stage == 0 and index == 0,
                is_last=is_last and index == len(patterns) - 1, stages=layout.pipeline))
            for index, pattern in enumerate(patterns)
        )  # fmt: skip
        layers = sum(map(len, patterns))
        block = sum(layer_bytes(shape, kind) for kind in ("*", "-"))
        if (
            setting.model.activation == "swiglu"
        ):  # both programs keep the gate's activation in addition to the two branches
            block += shape.size * shape.tokens * setting.model.ffn / layout.tensor
        logits = shape.tokens * setting.model.vocab / layout.tensor if is_last else 0.0
        if software == "nanotron":
            # bf16 weights and gradients, fp32 accumulators; fp32 master and moments, divided by ZeRO-1.
            state = numel * (2 + 2 + 4 + 12 / (layout.data if found.is_optimizer_sharded else 1))
            flight = min(layout.pipeline - stage, layout.microbatches_per_step)
            # It keeps the inputs of both layers of a block after gathering them over the tensor ranks.
            gathered = 2 * hidden_bytes(shape) * (layout.tensor - 1)
            kept = flight * layers / 2 * (block + gathered) + 10 * logits
        else:
            # fp32 weights, gradients and moments, all sharded; two blocks and the head gathered in bf16.
            state = numel * 16 / (layout.data * layout.context)
            state += 2 * 2 * numel * 2 / layers + 2 * setting.model.vocab * setting.model.hidden / layout.tensor
            flight = min(layout.pipeline - stage, layout.microbatches_per_step)
            kept = flight * layers / 2 * (block * KEPT_BY_SELECTION if setting.recompute < 1 else hidden_bytes(shape))
            kept += block + (LOSS_COMPILED if found.is_loss_compiled else LOSS_EAGER) * logits
            if layout.tensor > 1:  # inputs gathered over tensor ranks are kept while a block is recomputed
                kept += 2 * hidden_bytes(shape) * layout.tensor
        worst = max(worst, state + kept)
    return worst * UNUSABLE / GIB


def _on_megatron(found: Published) -> float:
    """Peak GiB of a run on Megatron-Core by this project's planner, without the memory that the planner reserves."""
    setting = found.setting
    parallel = ParallelConfig(
        tensor=setting.layout.tensor,
        sequence=setting.split_sequence,
        recompute="full" if setting.recompute == 1 else "none",
    )
    layout = setting.layout
    if "" in setting.stages:  # a chunk with only the embedding or the head: planned without virtual stages
        layout = replace(layout, virtual=1)
    else:
        setting = replace(setting, model=replace(setting.model, pattern="|".join(setting.stages)))
    ranks = [
        rank_memory(
            setting.model,
            parallel=parallel,
            precision=PrecisionConfig(params="bf16"),
            layout=layout,
            rows=setting.rows,
            sequence=setting.sequence,
            stage=stage,
        )
        for stage in range(layout.pipeline)
    ]
    return max(rank.total - rank.reserve for rank in ranks) * UNUSABLE / GIB
