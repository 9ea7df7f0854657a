"""Seconds of a training step on given GPUs, by part. The constants are in `launch.plan.cost.efficiency`.

    products      FLOPs / (peak x efficiency), plus the tail of the last wave of tiles; or bytes / bandwidth if that is longer
    elementwise   bytes / bandwidth
    collectives   bytes / (link or network), minus the part that overlaps with products
    pipeline      (microbatches + (stages - 1) / virtual) x the slowest stage

Not modelled: a network shared with other jobs, slow nodes, a data loader that is too slow.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from launch.plan.cost.device import Device, Format
from launch.plan.cost.efficiency import MEGATRON, Efficiency, Software
from launch.plan.cost.layer_work import Gemm, LatentAttention, LayerWork, head_work, layer_work, projection_work
from recipes.schema.layout import Layout
from recipes.schema.model import ModelConfig
from recipes.schema.muon import iteration_cost, layer_matrices
from recipes.schema.optim import MuonConfig
from recipes.schema.pattern import LayerKind, mtp_kinds


class Parts(defaultdict[str, float]):
    """Seconds by part of the step."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        super().__init__(float, seconds or {})

    def add(self, seconds: Mapping[str, float], *, times: float = 1.0) -> None:
        """Add other parts to these, each multiplied by `times`."""
        for name, value in seconds.items():
            self[name] += times * value


OPTIMIZER_BYTES = 30.0
"""Memory traffic of AdamW per parameter: gradient 4, master and two moments read and written 24, weight written 2."""
AVERAGE_BYTES = 12.0
"""Traffic of the moving average per parameter: master read 4, average read and written 8."""


@dataclass(frozen=True)
class Setting:
    """Everything a step's time depends on."""

    model: ModelConfig
    layout: Layout
    stages: tuple[str, ...]
    """Pattern of each model chunk in layer order (`recipes.schema.pattern.cut`)."""
    rows: int
    """Rows of a microbatch."""
    sequence: int
    device: Device
    low: Format | None = None
    """Format of low-precision products; None: all products are in `high`."""
    high: Format = "bf16"
    scaling: str = "none"
    high_precision_layers: frozenset[int] = frozenset()
    """Indexes of layers without low-precision products."""
    rules: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """{layer: {linear: its scaling}}, where it is not `scaling` (`precision.rules`)."""
    split_sequence: bool = False
    recompute: float = 0.0
    """Share of the layers' forward pass that is recomputed: 0 none, 1 full."""
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    teacher_s: float = 0.0
    """Seconds that a teacher adds to each microbatch on the last stage (`launch.plan.teacher`)."""
    muon: MuonConfig | None = None
    """How Muon updates matrices; None: AdamW updates them."""
    ema: bool = False
    """Whether the optimizer averages the weights."""
    latent: LatentAttention | None = None
    """Multi-head latent attention of a published model."""
    software: Software = MEGATRON
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on one context rank."""
        return self.rows * self.sequence // self.layout.context

    @property
    def is_expert_hybrid(self) -> bool:
        """Whether the model has Mamba-2 layers and experts."""
        return {"M", "E"} <= set("".join(self.stages))


@dataclass(frozen=True)
class StepTime:
    """Predicted time of one optimizer step."""

    seconds: float
    parts: Parts
    """Seconds by part, averaged over pipeline ranks; `uneven` is what the slowest rank needs in addition. They add up to
    `seconds`."""
    stage_seconds: tuple[float, ...]
    """Seconds of one microbatch, forward and backward, on each pipeline rank."""


def step_time(setting: Setting) -> StepTime:
    """Predict one step."""
    layout, m = setting.layout, setting.layout.microbatches_per_step
    ranks = [_rank_microbatch(setting, stage) for stage in range(layout.pipeline)]
    sums = [sum(parts.values()) for parts in ranks]
    parts = Parts()
    for rank in ranks:
        parts.add(rank, times=m / layout.pipeline)
    mean, slowest = sum(sums) / layout.pipeline, max(sums)
    parts["uneven"] += m * (slowest - mean)
    if layout.pipeline > 1:
        hop = 2.0 * setting.tokens * setting.model.hidden / (layout.tensor if setting.split_sequence else 1)
        wire = hop / _bandwidth(setting, size=layout.pipeline, stride=layout.tensor * layout.context * layout.data)
        parts["bubble"] += (layout.pipeline - 1) * (mean / layout.virtual + 2 * wire)
        # One pair of messages for each microbatch and chunk; about half of it overlaps with products.
        parts["pipeline"] += m * layout.virtual * wire
    parts.add(_data_parallel(setting, slowest))
    shards = layout.data * layout.context
    owned = max(
        dense / shards + experts / layout.expert_data
        for dense, experts in (_rank_weights(setting, stage) for stage in range(layout.pipeline))
    )
    bytes_each = OPTIMIZER_BYTES + (AVERAGE_BYTES if setting.ema else 0)
    parts["optimizer"] += bytes_each * owned / (setting.device.hbm * setting.efficiency.hbm)
    if setting.muon is not None:
        parts["optimizer"] += max(muon_seconds(setting, stage, muon=setting.muon) for stage in range(layout.pipeline))
    nodes = max(1.0, layout.world / setting.device.node)
    parts["jitter"] += sum(parts.values()) * setting.efficiency.jitter * math.log2(nodes)
    return StepTime(seconds=sum(parts.values()), parts=parts, stage_seconds=tuple(sums))


def muon_seconds(setting: Setting, stage: int, *, muon: MuonConfig) -> float:
    """Seconds in which the ranks of a stage orthogonalize its matrices, in bf16, and exchange their parts before and after.

    Each matrix has one owner: no rank is faster than the most expensive matrix of the stage. The exchange hides nothing.
    """
    layout, device, eff = setting.layout, setting.device, setting.efficiency
    layers = Counter("".join(setting.stages[chunk] for chunk in range(stage, len(setting.stages), layout.pipeline)))
    cost, largest, elements = 0, 0, 0.0
    if is_last := stage == layout.pipeline - 1:
        layers += Counter(mtp_kinds(setting.model) * setting.model.mtp.sets)
    found = [(n, *one) for kind, n in layers.items() for one in layer_matrices(setting.model, kind, muon=muon)]
    if is_last and setting.model.mtp.depths:
        found.append((setting.model.mtp.sets, 1, setting.model.hidden, 2 * setting.model.hidden))
    for count, matrices, rows, columns in found:
        here = matrices // layout.expert if matrices > 1 else matrices
        one = here * iteration_cost(rows, columns)  # the experts of a rank have one owner
        owners = layout.expert_tensor if matrices > 1 else layout.tensor
        elements += count * here * rows * columns / owners
        cost, largest = cost + count * here * iteration_cost(rows, columns), max(largest, one)
    shards = layout.data * layout.context
    operands: Format = "bf16" if "bf16" in device.peak else "fp32"
    peak = device.peak[operands] * device.clock * eff.gemm[device.generation][operands]
    products = 2 * muon.iterations * max(cost / (shards * layout.tensor), largest) / peak
    exchange = 0.0
    for size, stride in ((shards, layout.tensor), (layout.tensor, 1)):
        if size > 1:
            sent = 4.0 * elements / shards * (size - 1) / size
            exchange += 2 * (sent / _bandwidth(setting, size=size, stride=stride) + eff.hop_s * size)
    return products + exchange


def layer_seconds(setting: Setting, kind: LayerKind | Literal["head"], *, is_low: bool = False) -> float:
    """Seconds of one layer, or of the head, for one microbatch: forward and backward on one rank."""
    if kind == "head":
        return sum(_layer(setting, "head", head_of(setting)).values())
    return sum(_layer(setting, kind, _work(setting, kind, is_low=is_low)).values())


def forward_seconds(setting: Setting) -> float:
    """Seconds of one microbatch's forward pass through all layers and the head on one rank, without a backward pass."""
    full = replace(setting, recompute=1.0)  # recomputing a layer takes as long as its forward pass
    layers = Counter("".join(setting.stages))
    total = 0.0
    for kind, count in layers.items():
        total += count * _layer(full, kind, _work(setting, kind, is_low=setting.low is not None))["recompute"]  # type: ignore[arg-type]
    return total + sum(_product(setting, gemm, gemm.m, gemm.n, gemm.k) for gemm in head_of(setting).gemms)


def head_of(setting: Setting) -> LayerWork:
    """Work of the head for one microbatch."""
    return head_work(
        setting.model, tokens=setting.tokens, tensor=setting.layout.tensor, split_sequence=setting.split_sequence
    )


def _work(setting: Setting, kind: LayerKind, *, is_low: bool, scalings: Mapping[str, str] | None = None) -> LayerWork:
    return layer_work(
        kind,
        setting.model,
        tokens=setting.tokens,
        sequence=setting.sequence,
        tensor=setting.layout.tensor,
        context=setting.layout.context,
        expert=setting.layout.expert,
        expert_tensor=setting.layout.expert_tensor,
        split_sequence=setting.split_sequence,
        is_low=is_low,
        scalings=scalings,
        latent=setting.latent,
    )


def _rank_microbatch(setting: Setting, stage: int) -> Parts:
    """Seconds of one microbatch, forward and backward, in all chunks of a pipeline rank."""
    layout = setting.layout
    parts = Parts()
    starts = [sum(len(s) for s in setting.stages[:i]) for i in range(len(setting.stages))]
    kinds: Counter[tuple[LayerKind, bool, tuple[tuple[str, str], ...]]] = Counter()
    for chunk in range(stage, len(setting.stages), layout.pipeline):
        for offset, kind in enumerate(setting.stages[chunk]):
            is_low = setting.low is not None and starts[chunk] + offset not in setting.high_precision_layers
            kinds[kind, is_low, tuple(setting.rules.get(starts[chunk] + offset, {}).items())] += 1  # type: ignore[index]
    for (kind, is_low, scalings), count in kinds.items():
        parts.add(_layer(setting, kind, _work(setting, kind, is_low=is_low, scalings=dict(scalings))), times=count)
    if stage == layout.pipeline - 1:
        parts.add(_layer(setting, "head", head_of(setting)))
        for work_kind, work in _depth_work(setting):
            parts.add(_layer(setting, work_kind, work), times=setting.model.mtp.depths)
        parts["teacher"] += setting.teacher_s
    if setting.software.shards != "optimizer":
        parts.add(_gather_parameters(setting, sum(_rank_weights(setting, stage)), sum(parts.values())))
    return parts


def _depth_work(setting: Setting) -> list[tuple[str, LayerWork]]:
    """Work of one further depth (`model.mtp`): its projection, layers in high precision, and a pass of the head."""
    model, tensor = setting.model, setting.layout.tensor
    if not mtp_kinds(model):
        return []
    return [
        ("head", projection_work(model, tokens=setting.tokens, tensor=tensor)),
        *((kind, _work(setting, kind, is_low=False)) for kind in mtp_kinds(model)),
        ("head", head_of(setting)),
    ]


def _layer(setting: Setting, kind: str, work: LayerWork) -> Parts:
    """Seconds of one layer's forward and backward pass."""
    eff, device, software = setting.efficiency, setting.device, setting.software
    memory = device.hbm * eff.hbm
    parts = Parts()
    name = {"M": "mamba", "*": "attention", "w": "attention", "-": "mlp", "E": "experts", "head": "head"}[kind]
    recompute = setting.recompute if kind != "head" else 0.0

    forward = sum(_product(setting, gemm, gemm.m, gemm.n, gemm.k) for gemm in work.gemms)
    backward = sum(
        _product(setting, gemm, gemm.m, gemm.k, gemm.n) + _product(setting, gemm, gemm.n, gemm.k, gemm.m)
        for gemm in work.gemms
    )
    parts[name] += forward + backward
    tensor_peak = device.peak.get("bf16", device.peak["fp32"]) * device.clock
    scores = work.score_flops / (tensor_peak * eff.attention[device.generation] * software.attention)
    scan = work.scan_flops / (tensor_peak * eff.scan)
    parts["scores"] += 3.5 * scores  # backward recomputes the scores: five products instead of two
    parts["scan"] += 3.5 * scan
    unfused = max(software.elementwise, eff.expert_hybrid) if setting.is_expert_hybrid else software.elementwise
    elementwise = work.forward_bytes * unfused / memory
    parts["elementwise"] += elementwise + work.backward_bytes * unfused / memory
    parts["elementwise"] += (
        2 * setting.software.gradient_bytes * (work.weights + work.expert_weights) / memory
    )  # adding to the gradient sums
    cast = sum(_cast_bytes(setting, gemm) for gemm in work.gemms) / memory
    parts["quantise"] += cast
    parts["launch"] += eff.kernel_s * (20 if kind != "head" else 10) + (software.expert_s if kind == "E" else 0.0)
    routing = work.routed_bytes * eff.route / memory
    parts["elementwise"] += routing

    if any(work.tensor_collectives):
        size = work.tensor_bytes * (setting.layout.tensor - 1) / setting.layout.tensor
        seconds = size / _bandwidth(setting, size=setting.layout.tensor, stride=1) + eff.hop_s
        exposed = seconds * (1 - software.hides_tensor)
        parts["tensor"] += exposed * sum(work.tensor_collectives)
        parts["recompute"] += recompute * exposed * work.tensor_collectives[0]
    if setting.layout.context > 1:
        parts.add(_context(setting, work, scores))
    exchange = _expert_exchange(setting, work)
    parts["exchange"] += 2 * exchange
    parts["recompute"] += recompute * exchange
    parts["recompute"] += recompute * (forward + scores + scan + elementwise + 4 / 9 * routing + cast / 3)
    return parts


def _product(setting: Setting, gemm: Gemm, m: int, n: int, k: int) -> float:
    """Seconds of one matrix product [m, k] x [k, n] of a linear layer; of all its experts, which share the rows gemm.m."""
    eff, device = setting.efficiency, setting.device
    operands: Format = setting.high
    if gemm.is_low and setting.low is not None:
        operands = setting.low if gemm.scaling is None else ("fp4" if gemm.scaling == "nvfp4" else "fp8")
    if operands not in device.peak:
        operands = "bf16" if "bf16" in device.peak else "fp32"
    size = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}[
        operands
    ]  # fp4: 4 bits, and an 8-bit scale for 16 numbers
    peak = device.peak[operands] * device.clock * eff.gemm[device.generation][operands] * setting.software.products
    matrices = max(1, gemm.experts)
    rows = gemm.m / matrices  # of one expert: the dim m of its product, or the sum k in the weight gradient
    m_one, k_one = (rows, k) if m == gemm.m else (m, rows)
    tiles = matrices * max(1.0, m_one / 128) * max(1.0, n / 256)
    # A tile that an expert's few rows do not fill takes as long as a full one.
    filled = 1.0 if not gemm.experts or m != gemm.m else min(1.0, m_one / 128)
    compute = 2.0 * m * n * k / (peak * filled) * (1 + eff.tail * device.sms / tiles)
    traffic = matrices * (size * (m_one * k_one + k_one * n) + 2.0 * m_one * n) / (device.hbm * eff.hbm)
    return max(compute, traffic)


def _expert_exchange(setting: Setting, work: LayerWork) -> float:
    """Seconds of sending rows to experts and back, forward, that do not overlap with products."""
    layout, seconds = setting.layout, 0.0
    if work.expert_bytes:
        speed = _bandwidth(setting, size=layout.expert, stride=layout.expert_tensor)
        share = (layout.expert - 1) / layout.expert
        seconds += (
            2 * (work.expert_bytes * share / speed + setting.efficiency.hop_s) * (1 - setting.software.hides_exchange)
        )
    if work.expert_tensor_bytes:
        speed = _bandwidth(setting, size=layout.expert_tensor, stride=1)
        share = (layout.expert_tensor - 1) / layout.expert_tensor
        seconds += 2 * (work.expert_tensor_bytes * share / speed + setting.efficiency.hop_s)
    return seconds


def _cast_bytes(setting: Setting, gemm: Gemm) -> float:
    """Memory traffic of quantising a linear layer's input and output gradient, each along both dimensions."""
    if not gemm.is_low or setting.low is None:
        return 0.0
    elements = gemm.m * (gemm.k + gemm.n)
    # Current scaling reads once more, for the largest magnitude. NVFP4 does so too, and writes half as much.
    reads, writes = {"current": (4.0, 2.0), "nvfp4": (4.0, 1.125)}.get(gemm.scaling or setting.scaling, (2.0, 2.0))
    return elements * (reads + writes)


def _context(setting: Setting, work: LayerWork, scores: float) -> Parts:
    """Seconds of context parallelism that do not overlap with attention."""
    layout, parts = setting.layout, Parts()
    speed = _bandwidth(setting, size=layout.context, stride=layout.tensor)
    ring = (layout.context - 1) * work.ring_bytes / speed
    parts["context"] += max(0.0, ring - scores) + max(0.0, 2 * ring - 2.5 * scores) + 0.1 * 3 * ring
    parts["context"] += 2 * work.exchange_bytes * (layout.context - 1) / layout.context / speed
    return parts


def _bandwidth(setting: Setting, *, size: int, stride: int) -> float:
    """Bytes/s that a rank sends in a collective over `size` ranks whose numbers are `stride` apart.

    Inside a domain this is the link's bandwidth. Across domains, the group's members in one domain share the ring, and each
    uses its own network card.
    """
    device, eff = setting.device, setting.efficiency
    link = device.link * eff.link
    if size * stride <= device.domain:
        return link
    members = max(1, min(size, device.domain // stride)) if stride < device.domain else 1
    return min(link, members * device.network * eff.network)


def _latency(setting: Setting, *, size: int, stride: int) -> float:
    """Seconds of a ring collective that do not depend on its bytes."""
    return setting.efficiency.hop_s * max(1.0, size * stride / setting.device.domain)


def _rank_weights(setting: Setting, stage: int) -> tuple[float, float]:
    """Number of weights on a pipeline rank: those in matrix products and of the embedding; those of routed experts."""
    layout, model = setting.layout, setting.model
    total = of_experts = 0.0
    for chunk in range(stage, len(setting.stages), layout.pipeline):
        for kind, count in Counter(setting.stages[chunk]).items():
            work = layer_work(
                kind,  # type: ignore[arg-type]
                model,
                tokens=1,
                sequence=1,
                tensor=layout.tensor,
                expert=layout.expert,
                expert_tensor=layout.expert_tensor,
                split_sequence=False,
                is_low=False,
                latent=setting.latent,
            )
            total += count * work.weights
            of_experts += count * work.expert_weights
    if stage == layout.pipeline - 1:
        for _, work in _depth_work(setting)[:-1]:
            total += model.mtp.sets * work.weights
            of_experts += model.mtp.sets * work.expert_weights
    table = model.vocab * model.hidden / layout.tensor
    head = model.hidden if model.head == "scalar" else table
    first, last = stage == 0, stage == layout.pipeline - 1
    if model.mtp.depths:  # the last stage has the embedding too
        first = first or last
    return total + table * first + head * (last and (model.has_own_head or not first)), of_experts


def _data_parallel(setting: Setting, microbatch: float) -> Parts:
    """Seconds of a step's gradient reduction and weight gathering that do not overlap with products."""
    layout, software = setting.layout, setting.software
    parts = Parts()
    size = layout.data * layout.context
    if size == 1 or software.shards != "optimizer":
        return parts
    # Experts are reduced over fewer ranks; their links are taken as those of the other weights.
    copies = (layout.expert_data - 1) / layout.expert_data * size / (size - 1)
    weights = max(
        dense + experts * copies
        for dense, experts in (_rank_weights(setting, stage) for stage in range(layout.pipeline))
    )
    speed = _bandwidth(setting, size=size, stride=layout.tensor)
    latency = _latency(setting, size=size, stride=layout.tensor)
    bucket = max(software.bucket_bytes, software.bucket_bytes_per_rank * layout.data)
    buckets = math.ceil(software.gradient_bytes * weights / bucket)
    reduce = software.gradient_bytes * weights * (size - 1) / size / speed + buckets * latency
    gather = 2.0 * weights * (size - 1) / size / speed + buckets * latency
    hidden_reduce = software.hides_data * microbatch * 2 / 3 if setting.overlap_grad_reduce else 0.0
    hidden_gather = software.hides_data * microbatch / 3 if setting.overlap_param_gather else 0.0
    parts["data"] += max(0.1 * reduce, reduce - hidden_reduce) + max(0.1 * gather, gather - hidden_gather)
    return parts


def _gather_parameters(setting: Setting, weights: float, compute: float) -> Parts:
    """Seconds that a microbatch waits for gathering weights (forward and backward) and scattering gradients (ZeRO-2, ZeRO-3)."""
    layout, software = setting.layout, setting.software
    size = layout.data * layout.context
    if size == 1:
        return Parts()
    speed = _bandwidth(setting, size=size, stride=layout.tensor)
    gathers = 2 if software.shards == "parameters" else 1
    traffic = (gathers * 2.0 + software.gradient_bytes) * weights * (size - 1) / size / speed
    layers = sum(map(len, setting.stages)) / layout.pipeline / 2
    traffic += (gathers + 1) * layers * _latency(setting, size=size, stride=layout.tensor)
    return Parts({"data": max((1 - software.hides_data) * traffic, traffic - software.hides_data * compute)})
