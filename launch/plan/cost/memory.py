"""Bytes on each rank of a recipe: weights, gradients, optimizer state, low-precision copies, activations, buffers.

Weights, gradients and optimizer state are exact (`launch.plan.cost.tensors`; tests/launch/plan compares them with built models,
in all kinds of layout). Activations are within a few percent of what autograd keeps on a CPU; not measured on a GPU.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from launch.plan.cost.activations import (
    Modules,
    Shape,
    distilled_head_bytes,
    distilled_head_workspace,
    head_bytes,
    head_workspace,
    hidden_bytes,
    in_flight,
    layer_bytes,
    layer_workspace,
)
from launch.plan.cost.tensors import bucket_size, buffers, stage_tensors
from recipes.schema.layout import Layout
from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import cut
from recipes.schema.precision import PrecisionConfig
from recipes.schema.scaling import low_precision_linears
from recipes.schema.units import GIB

RESERVE_BYTES = 2.0 * GIB
"""CUDA context, cuBLAS and NCCL workspaces, and memory the allocator cannot use: an assumption, not a measurement."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. The ranks of a stage differ only in optimizer state; this is the fullest."""

    stage: int
    weights: int
    gradients: int
    masters: int
    moments: int
    low_copies: int
    """Low-precision copies of the weights, plain and transposed (`te`)."""
    activations: float
    """What autograd keeps at the peak, over all microbatches in flight."""
    workspace: float
    """Temporary memory while one layer or the head runs."""
    communication: float
    """Buffers of messages between stages, and sequences gathered over tensor ranks."""
    reserve: float
    teacher: float
    """A teacher's weights and what its forward pass needs, on the last stage (`launch.plan.teacher`)."""
    in_flight: int
    """Microbatches (of one model chunk each) whose activations are kept at the peak."""

    @property
    def state(self) -> int:
        """What exists from the first step to the last."""
        return self.weights + self.gradients + self.masters + self.moments + self.low_copies

    @property
    def total(self) -> float:
        return self.state + self.activations + self.workspace + self.communication + self.teacher + self.reserve


def optimizer_state(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    stage: int,
    shard: int | None = None,
) -> "State":
    """Bytes of weights, gradients and optimizer state of a pipeline rank.

    shard: its index among the data-parallel x context ranks; None: an equal part of every bucket with its padding, which no rank
    exceeds.
    """
    return _state(
        model,
        precision,
        replace(layout, microbatches_per_step=0),
        overlap=parallel.overlap_grad_reduce,
        stage=stage,
        shard=shard,
    )


@lru_cache(maxsize=4096)
def _state(
    model: ModelConfig, precision: PrecisionConfig, layout: Layout, *, overlap: bool, stage: int, shard: int | None
) -> "State":
    chunks = cut(model.pattern, layout.pipeline * layout.virtual, model=model)
    low = low_precision_linears(model, precision)
    shards = layout.data * layout.context
    size = 2 if precision.params == "bf16" else 4
    weights = gradients = masters = moments = low_copies = 0
    for index in range(layout.virtual):
        place = index * layout.pipeline + stage
        start = sum(map(len, chunks[:place]))
        tensors = stage_tensors(
            model,
            chunks[place],
            tensor=layout.tensor,
            is_first=place == 0,
            is_last=place == len(chunks) - 1,
            stages=layout.pipeline,
            low_layers=frozenset(layer - start for layer in low if start <= layer < start + len(chunks[place])),
        )
        bucket = bucket_size(
            data=layout.data,
            overlap=overlap,
            is_first_stage=stage == 0,
            is_first_chunk=index == 0,
        )
        for buffer in buffers(tensors, all_fp32=size == 4, shards=shards, bucket_numel=bucket):
            is_fp32 = buffer.is_fp32
            kept = buffer.numel // shards if shard is None else buffer.shard(shard, shards)
            weights += buffer.numel * (4 if is_fp32 else size)
            gradients += buffer.numel * 4
            masters += 0 if is_fp32 else 4 * kept
            moments += 8 * kept
        low_numel = sum(one.numel for one in tensors if one.is_low)
        if precision.fp8_weights:  # the weights themselves are 1 byte, with a transposed copy of 1 byte
            weights -= low_numel * (size - 1)
            low_copies += low_numel
        else:
            low_copies += 2 * low_numel
    return State(weights, gradients, masters, moments, low_copies)


@dataclass(frozen=True)
class State:
    """Bytes that are independent of microbatches."""

    weights: int
    gradients: int
    masters: int
    moments: int
    low_copies: int


def rank_memory(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    rows: int,
    sequence: int,
    stage: int,
    modules: Modules = "te",
    teacher: float = 0.0,
    distils: bool = False,
) -> RankMemory:
    """Memory of the fullest rank of a pipeline stage. rows: of a microbatch. teacher: its bytes, on the last stage. distils:
    whether the loss is distillation, which keeps the logits of only a few tokens at a time."""
    state = optimizer_state(model, parallel=parallel, precision=precision, layout=layout, stage=stage)
    kept, workspace = stage_activations(
        model,
        parallel=parallel,
        precision=precision,
        layout=layout,
        rows=rows,
        sequence=sequence,
        stage=stage,
        modules=modules,
        distils=distils,
    )
    shape = _shape(model, precision, layout, rows=rows, sequence=sequence, parallel=parallel, modules=modules)
    message = hidden_bytes(shape)
    waiting = min(layout.pipeline - stage, layout.microbatches_per_step) * message if layout.pipeline > 1 else 0.0
    gathered = 2 * message * layout.tensor if parallel.sequence else 0.0
    return RankMemory(
        stage=stage,
        weights=state.weights,
        gradients=state.gradients,
        masters=state.masters,
        moments=state.moments,
        low_copies=state.low_copies if modules == "te" else 0,
        activations=kept,
        workspace=workspace,
        communication=waiting + gathered,
        reserve=RESERVE_BYTES if modules == "te" else 0.0,
        teacher=teacher if stage == layout.pipeline - 1 else 0.0,
        in_flight=_most_in_flight(layout, stage),
    )


def stage_activations(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    rows: int,
    sequence: int,
    stage: int,
    modules: Modules,
    distils: bool = False,
) -> tuple[float, float]:
    """(bytes autograd keeps at the peak, bytes of the largest temporary need) on a pipeline rank."""
    shape = _shape(model, precision, layout, rows=rows, sequence=sequence, parallel=parallel, modules=modules)
    chunks = cut(model.pattern, layout.pipeline * layout.virtual, model=model)
    low = low_precision_linears(model, precision)
    is_full = parallel.recompute == "full"
    head, workspace = (distilled_head_bytes, distilled_head_workspace) if distils else (head_bytes, head_workspace)
    kept, again, mine = [], [], []
    hidden = hidden_bytes(shape)
    own = hidden if modules == "te" or shape.size == 4 else 0.0  # a layer's input is also its norm's
    for index in range(layout.virtual):
        place = index * layout.pipeline + stage
        start = sum(map(len, chunks[:place]))
        layers = [
            layer_bytes(shape, kind, is_low=start + offset in low)  # type: ignore[arg-type]
            for offset, kind in enumerate(chunks[place])
        ]
        ends = head(shape) if place == len(chunks) - 1 else 0.0
        ends += 8.0 * shape.tokens if place == 0 else 0.0
        kept.append(len(layers) * hidden if is_full else sum(layers))
        # Layer i is recomputed when the inputs of the layers behind it are freed already.
        back = [layer - (len(layers) - count) * hidden - own for count, layer in enumerate(layers, start=1)]
        again.append((max(0.0, *back) if is_full else 0.0, ends))
        mine.append(chunks[place])
    now = worst = 0.0
    for way, chunk in in_flight(
        stage=stage,
        stages=layout.pipeline,
        virtual=layout.virtual,
        microbatches=min(layout.microbatches_per_step, 2 * layout.pipeline),
    ):
        if way > 0:
            now += kept[chunk]
            worst = max(worst, now + again[chunk][1])
        else:  # the head is freed before a layer is recomputed
            worst = max(worst, now + again[chunk][0])
            now -= kept[chunk]
    passing = layer_workspace(shape, "".join(mine))
    if stage == layout.pipeline - 1:
        passing = max(passing, workspace(shape))
    return worst, passing


def _most_in_flight(layout: Layout, stage: int) -> int:
    """The largest number of forward passes of a chunk that wait for their backward pass on a pipeline rank."""
    ways = in_flight(
        stage=stage,
        stages=layout.pipeline,
        virtual=layout.virtual,
        microbatches=min(layout.microbatches_per_step, 2 * layout.pipeline),
    )
    return max(accumulate(way for way, _ in ways))


def _shape(
    model: ModelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    *,
    rows: int,
    sequence: int,
    parallel: ParallelConfig,
    modules: Modules,
) -> Shape:
    return Shape(
        model=model,
        modules=modules,
        size=2 if precision.params == "bf16" else 4,
        rows=rows,
        sequence=sequence,
        tensor=layout.tensor,
        context=layout.context,
        split_sequence=parallel.sequence,
    )
