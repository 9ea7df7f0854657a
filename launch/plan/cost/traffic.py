"""FLOPs of a training step, its memory traffic, and its traffic between GPUs: counts by part, averaged over GPUs."""

from collections import Counter
from dataclasses import dataclass

from launch.plan.cost.layer_work import LayerWork, layer_work, projection_work
from launch.plan.cost.tensors import bucket_size, buffers, stage_tensors
from launch.plan.cost.time import Setting, head_of
from recipes.schema.pattern import layer_norms, mtp_kinds


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
            context=layout.context,
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
    head = head_of(setting)
    projection = projection_work(setting.model, tokens=setting.tokens, tensor=layout.tensor)
    for work, count in ((head, 1 + depths), (projection, depths)):
        _products(parts["head"], work, per_rank * count, 0.0)
        _wire(setting, wire, work, per_rank * count, 0.0)
    _embedding_and_loss(setting, wire, per_rank, depths)
    _gradients_and_weights(setting, wire)
    if layout.pipeline > 1:
        hop = 2.0 * setting.tokens * setting.model.hidden / (layout.tensor if setting.split_sequence else 1)
        hops = layout.pipeline * layout.virtual - 1
        wire["pipeline"] += 2 * hop * hops * layout.microbatches_per_step / layout.pipeline
    return StepTraffic(parts=parts, wire_bytes=wire)


def _embedding_and_loss(setting: Setting, wire: dict[str, float], per_rank: float, depths: int) -> None:
    """Add what the tensor ranks exchange outside layers and products.

    The embedding's partial sums: one all-reduce, or a reduce-scatter forward and a gather backward. The cross-entropy of logits
    that are split by vocabulary: a maximum, a sum of exponentials and the label's logit, an fp32 all-reduce each. Under sequence
    parallelism once a step: the gradients of weights that every tensor rank has, norms and routers.
    """
    model, layout = setting.model, setting.layout
    sent = (layout.tensor - 1) / layout.tensor
    wire["tensor"] += per_rank * 2 * 2.0 * setting.tokens * model.hidden * sent
    if model.head == "vocabulary":
        wire["tensor"] += per_rank * (1 + depths) * 3 * 2 * 4.0 * setting.tokens * sent
    if setting.split_sequence:
        shared = sum(
            layer_norms(model) + (model.experts.count * model.hidden if kind == "E" else 0)
            for kind in "".join(setting.stages)
        )
        wire["tensor"] += 2 * 4.0 * (shared + model.hidden) / layout.pipeline * sent


def _gradients_and_weights(setting: Setting, wire: dict[str, float]) -> None:
    """Add the scattered fp32 gradients and the gathered weights of Megatron's buffers, padding included. Each pipeline stage has
    its own."""
    layout, chunks = setting.layout, setting.stages
    for index, pattern in enumerate(chunks):
        tensors = stage_tensors(
            setting.model, pattern, tensor=layout.tensor, expert=layout.expert, expert_tensor=layout.expert_tensor,
            is_first=index == 0, is_last=index == len(chunks) - 1, stages=layout.pipeline,
        )  # fmt: skip
        shards = layout.data * layout.context
        for buffer in buffers(
            tensors, all_fp32=setting.high == "fp32", shards=shards, expert_shards=layout.expert_data,
            bucket_numel=bucket_size(
                data=layout.data, overlap=setting.overlap_grad_reduce, is_first_stage=index == 0, is_first_chunk=index == 0
            ),
        ):  # fmt: skip
            ranks = layout.expert_data if buffer.is_expert else shards
            size = 4 + (4 if buffer.is_fp32 else 2)
            wire["data"] += size * buffer.numel * (ranks - 1) / ranks / layout.pipeline


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
