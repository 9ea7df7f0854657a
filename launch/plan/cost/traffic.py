"""FLOPs of a training step, its memory traffic, and its traffic between GPUs: counts by part, averaged over GPUs."""

from collections import Counter
from dataclasses import dataclass

from launch.plan.cost.layer_work import LayerWork, head_work, layer_work, projection_work
from launch.plan.cost.time import Setting
from recipes.schema.pattern import mtp_kinds


@dataclass
class Traffic:
    """FLOPs and memory traffic of one GPU for one part of the model in a step."""

    flops: float = 0.0
    """Forward, backward and recomputation."""
    memory_bytes: float = 0.0
    """Reads and writes of the GPU's own memory."""


@dataclass(frozen=True)
class StepTraffic:
    """One step, averaged over GPUs."""

    parts: dict[str, Traffic]
    """Mamba-2 projections, scan, attention projections, attention scores, MLP, experts, head."""
    wire_bytes: dict[str, float]
    """Bytes sent to other GPUs, by axis: tensor, context, expert, pipeline, data."""


PARTS = {
    "M": "Mamba-2 projections",
    "*": "attention projections",
    "w": "attention projections",
    "-": "MLP",
    "E": "experts",
    "head": "head",
}


def step_traffic(setting: Setting) -> StepTraffic:
    """Count one step. A product reads its operands once and writes its result once."""
    layout = setting.layout
    names = (
        "Mamba-2 projections",
        "Mamba-2 scan",
        "attention projections",
        "attention scores",
        "MLP",
        "experts",
        "head",
    )
    parts = {name: Traffic() for name in names}
    wire = dict.fromkeys(("tensor", "context", "expert", "pipeline", "data"), 0.0)
    per_rank = layout.microbatches_per_step / layout.pipeline  # microbatches, averaged over stages
    depths = setting.model.mtp.depths
    layers = Counter("".join(setting.stages)) + Counter(mtp_kinds(setting.model) * depths)
    for kind, count in layers.items():
        work = layer_work(
            kind,  # type: ignore[arg-type]
            setting.model,
            tokens=setting.tokens,
            sequence=setting.sequence,
            tensor=layout.tensor,
            expert=layout.expert,
            expert_tensor=layout.expert_tensor,
            split_sequence=setting.split_sequence,
            is_low=False,
            latent=setting.latent,
        )
        times = per_rank * count
        recompute = setting.recompute
        _products(parts[PARTS[kind]], work, times, recompute)
        if kind == "M":
            parts["Mamba-2 scan"].flops += times * (3 + recompute) * work.scan_flops
        elif kind in "*w":
            parts["attention scores"].flops += times * (3 + recompute) * work.score_flops
        _wire(setting, wire, work, times, recompute)
    head = head_work(setting.model, tokens=setting.tokens, tensor=layout.tensor)
    projection = projection_work(setting.model, tokens=setting.tokens, tensor=layout.tensor)
    for work, count in ((head, 1 + depths), (projection, depths)):
        _products(parts["head"], work, per_rank * count, 0.0)
        _wire(setting, wire, work, per_rank * count, 0.0)
    shards = layout.data * layout.context
    table = setting.model.vocab * setting.model.hidden / layout.tensor
    own_head = setting.model.hidden if setting.model.head == "scalar" else table
    weights, of_experts = table + own_head * setting.model.has_own_head, 0.0
    stored = Counter("".join(setting.stages)) + Counter(mtp_kinds(setting.model) * setting.model.mtp.sets)
    weights += setting.model.mtp.sets * projection.weights
    for kind, count in stored.items():
        work = _weights(setting, kind)
        weights += count * work.weights
        of_experts += count * work.expert_weights
    wire["data"] += 6.0 * weights / layout.pipeline * (shards - 1) / shards
    wire["data"] += 6.0 * of_experts / layout.pipeline * (layout.expert_data - 1) / layout.expert_data
    if layout.pipeline > 1:
        hop = 2.0 * setting.tokens * setting.model.hidden / (layout.tensor if setting.split_sequence else 1)
        hops = layout.pipeline * layout.virtual - 1
        wire["pipeline"] += 2 * hop * hops * layout.microbatches_per_step / layout.pipeline
    return StepTraffic(parts=parts, wire_bytes=wire)


def _weights(setting: Setting, kind: str) -> LayerWork:
    """One layer on one rank, for the number of its weights."""
    return layer_work(
        kind,  # type: ignore[arg-type]
        setting.model,
        tokens=1,
        sequence=1,
        tensor=setting.layout.tensor,
        expert=setting.layout.expert,
        expert_tensor=setting.layout.expert_tensor,
        split_sequence=False,
        is_low=False,
        latent=setting.latent,
    )


def _products(part: Traffic, work: LayerWork, times: float, recompute: float) -> None:
    """Add a layer's products and elementwise work. Backward has two products for each forward one."""
    part.flops += times * (3 + recompute) * sum(gemm.flops for gemm in work.gemms)
    once = sum(
        2.0 * (gemm.m * gemm.k + max(1, gemm.experts) * gemm.k * gemm.n + gemm.m * gemm.n) for gemm in work.gemms
    )
    part.memory_bytes += times * ((3 + recompute) * once + (1 + recompute) * work.forward_bytes + work.backward_bytes)


def _wire(setting: Setting, wire: dict[str, float], work: LayerWork, times: float, recompute: float) -> None:
    """Add a layer's traffic over the tensor and context ranks."""
    layout = setting.layout
    forward, backward = work.tensor_collectives
    wire["tensor"] += (
        times * ((1 + recompute) * forward + backward) * work.tensor_bytes * (layout.tensor - 1) / layout.tensor
    )
    ring_steps = layout.context - 1
    passes = 4 + 2 * recompute  # there and back, forward and backward
    experts, parts = layout.expert, layout.expert_tensor
    wire["expert"] += times * passes * work.expert_bytes * (experts - 1) / experts
    wire["expert"] += times * passes * work.expert_tensor_bytes * (parts - 1) / parts
    wire["context"] += times * ring_steps * (3 * work.ring_bytes + 2 * work.exchange_bytes / layout.context)
