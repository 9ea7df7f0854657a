"""Bytes on each rank: weights, gradients, optimizer state, low-precision copies, activations, buffers.

Weights, gradients and optimizer state are exact (`launch.plan.cost.tensors`; tests/launch/plan compares them with built models
in all kinds of layout). Activations are within 10 % of the tensors that autograd saves on a CPU; not measured on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from launch.plan.cost.activations import (
    Modules,
    Shape,
    depths_bytes,
    distilled_head_bytes,
    distilled_head_workspace,
    head_bytes,
    head_workspace,
    hidden_bytes,
    layer_bytes,
    layer_workspace,
    pipeline_schedule,
)
from launch.plan.cost.tensors import bucket_size, buffers, stage_tensors
from recipes.schema.layout import Layout
from recipes.schema.lora import adapted_linears
from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import cut, layer_kinds
from recipes.schema.precision import PrecisionConfig
from recipes.schema.scaling import low_precision_linears
from recipes.schema.units import GIB

RESERVE_BYTES = 2.0 * GIB
"""CUDA context, cuBLAS and NCCL workspaces, and memory the allocator cannot use: an assumption, not a measurement."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank of a stage. Its ranks differ only in optimizer state."""

    stage: int
    weights: int
    gradients: int
    masters: int
    moments: int
    """Moments, and the moving average of the weights."""
    low_copies: int
    """Low-precision copies of the weights, plain and transposed (`te`)."""
    activations: float
    """Tensors that autograd keeps at the peak, for all microbatches in flight."""
    workspace: float
    """Temporary memory while one layer or the head runs."""
    communication: float
    """Message buffers between stages, and sequences gathered over tensor ranks."""
    reserve: float
    teacher: float
    """Frozen models: a teacher's weights and the workspace of its forward pass, on the last stage (`launch.plan.teacher`), or the
    weights of a reference and a reward model (`launch.plan.alignment`)."""
    answers: float
    """Caches of the answers that GRPO generates, beyond the activations and temporary memory that are not in use meanwhile."""
    in_flight: int
    """Microbatches (of one model chunk each) whose activations are kept at the peak."""

    @property
    def state(self) -> int:
        """Memory that is in use from the first step to the last."""
        return self.weights + self.gradients + self.masters + self.moments + self.low_copies

    @property
    def total(self) -> float:
        return (
            self.state
            + self.activations
            + self.workspace
            + self.communication
            + self.teacher
            + self.answers
            + self.reserve
        )


def optimizer_state(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    stage: int,
    shard: int | None = None,
    expert_shard: int | None = None,
    muon: bool = False,
    ema: bool = False,
) -> "State":
    """Bytes of weights, gradients and optimizer state of a pipeline rank. muon: matrices have no second moment. ema: weights have
    a moving average.

    shard, expert_shard: its index among the data-parallel x context ranks, and among the ranks with its experts. None: an equal
    part of each bucket including padding, an upper bound for all ranks.
    """
    return _state(
        model,
        precision,
        replace(layout, microbatches_per_step=0),
        overlap=parallel.overlap_grad_reduce,
        stage=stage,
        shard=shard,
        expert_shard=expert_shard,
        muon=muon,
        ema=ema,
    )


@lru_cache(maxsize=4096)
def _state(
    model: ModelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    *,
    overlap: bool,
    stage: int,
    shard: int | None,
    expert_shard: int | None,
    muon: bool,
    ema: bool,
) -> "State":
    chunks = cut(model.pattern, layout.pipeline * layout.virtual, model=model)
    low = low_precision_linears(model, precision)
    adapted = adapted_linears(model.lora, layer_kinds(model.pattern))
    shards = layout.data * layout.context
    size = 2 if precision.params == "bf16" else 4
    weights = gradients = masters = moments = low_copies = update = 0
    for index in range(layout.virtual):
        chunk = index * layout.pipeline + stage
        start = sum(map(len, chunks[:chunk]))
        tensors = stage_tensors(
            model,
            chunks[chunk],
            tensor=layout.tensor,
            expert=layout.expert,
            expert_tensor=layout.expert_tensor,
            is_first=chunk == 0,
            is_last=chunk == len(chunks) - 1,
            stages=layout.pipeline,
            low=_of_chunk(low, start, len(chunks[chunk])),
            adapted=_of_chunk(adapted, start, len(chunks[chunk])) if model.lora.rank else None,
        )
        weights += sum(one.numel * (4 if one.is_fp32 else size) for one in tensors if one.is_frozen)
        bucket = bucket_size(
            data=layout.data,
            overlap=overlap,
            is_first_stage=stage == 0,
            is_first_chunk=index == 0,
        )
        for buffer in buffers(
            tensors, all_fp32=size == 4, shards=shards, expert_shards=layout.expert_data, bucket_numel=bucket
        ):
            is_fp32 = buffer.is_fp32
            rank, ranks = (expert_shard, layout.expert_data) if buffer.is_expert else (shard, shards)
            own_numel = buffer.numel // ranks if rank is None else buffer.shard(rank, ranks)
            weights += buffer.numel * (4 if is_fp32 else size)
            gradients += buffer.numel * 4
            masters += 0 if is_fp32 else 4 * own_numel
            moments += (12 if ema else 8) * own_numel
            if muon:
                places = range(ranks) if rank is None else [rank]
                matrices = [buffer.shard_of_matrices(place, ranks) for place in places]
                moments -= 4 * min(matrices)
                update += 2 * 4 * max(matrices)
        low_numel = sum(one.numel for one in tensors if one.is_low)
        if precision.fp8_weights:  # the weights themselves are 1 byte, with a transposed copy of 1 byte
            weights -= low_numel * (size - 1)
            low_copies += low_numel
        else:
            low_copies += 2 * low_numel
    return State(weights, gradients, masters, moments, low_copies, update)


def _of_chunk(linears: Mapping[int, tuple[str, ...]], start: int, layers: int) -> dict[int, tuple[str, ...]]:
    """Linears of a chunk's layers, by index in the chunk."""
    return {layer - start: names for layer, names in linears.items() if start <= layer < start + layers}


@dataclass(frozen=True)
class State:
    """Bytes that do not depend on microbatches."""

    weights: int
    gradients: int
    masters: int
    moments: int
    low_copies: int
    update: int
    """Temporary memory of Muon's update: what this rank sends to the owners of matrices, and the matrices that it owns."""


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
    caches: float = 0.0,
    distils: bool = False,
    muon: bool = False,
    ema: bool = False,
) -> RankMemory:
    """Memory of the fullest rank of a pipeline stage.

    rows: rows of a microbatch. teacher: bytes of frozen models on this stage. caches: bytes in use while answers are
    generated. distils: whether the loss is distillation, which keeps the logits of only one chunk of tokens at a time. muon:
    whether Muon updates the matrices, when no activations are in use. ema: as in `optimizer_state`.
    """
    state = optimizer_state(
        model, parallel=parallel, precision=precision, layout=layout, stage=stage, muon=muon, ema=ema
    )
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
        workspace=max(workspace, state.update - kept),
        communication=waiting + gathered,
        reserve=RESERVE_BYTES if modules == "te" else 0.0,
        teacher=teacher,
        answers=max(0.0, caches - kept - workspace),
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
    """(bytes that autograd keeps at the peak, largest temporary bytes) on a pipeline rank."""
    shape = _shape(model, precision, layout, rows=rows, sequence=sequence, parallel=parallel, modules=modules)
    chunks = cut(model.pattern, layout.pipeline * layout.virtual, model=model)
    low = low_precision_linears(model, precision)
    is_full = parallel.recompute == "full"
    head, workspace = (distilled_head_bytes, distilled_head_workspace) if distils else (head_bytes, head_workspace)
    kept, recomputed, ends = (
        [],
        [],
        [],
    )  # bytes of each chunk of this rank: kept, recomputed in addition, embedding and head
    patterns = []
    hidden = hidden_bytes(shape)
    shared = hidden if modules == "te" or shape.size == 4 else 0.0  # the layer's input, which its norm keeps too
    for index in range(layout.virtual):
        chunk = index * layout.pipeline + stage
        start = sum(map(len, chunks[:chunk]))
        layers = [
            layer_bytes(shape, kind, is_low=start + offset in low)  # type: ignore[arg-type]
            for offset, kind in enumerate(chunks[chunk])
        ]
        kept.append(len(layers) * hidden if is_full else sum(layers))
        # When layer i is recomputed, the inputs of later layers are already freed.
        peaks = [layer - (len(layers) - count) * hidden - shared for count, layer in enumerate(layers, start=1)]
        recomputed.append(max(0.0, *peaks) if is_full else 0.0)
        last = head(shape) + depths_bytes(shape) if chunk == len(chunks) - 1 else 0.0
        ends.append(last + (8.0 * shape.tokens if chunk == 0 else 0.0))
        patterns.append(chunks[chunk])
    now = peak = 0.0
    for direction, index in pipeline_schedule(
        stage=stage,
        stages=layout.pipeline,
        virtual=layout.virtual,
        microbatches=min(layout.microbatches_per_step, 2 * layout.pipeline),
    ):
        if direction > 0:
            now += kept[index]
            peak = max(peak, now + ends[index])
        else:  # the head is freed before a layer is recomputed
            peak = max(peak, now + recomputed[index])
            now -= kept[index]
    temporary = layer_workspace(shape, "".join(patterns))
    if stage == layout.pipeline - 1:
        temporary = max(temporary, workspace(shape))
    return peak, temporary


def _most_in_flight(layout: Layout, stage: int) -> int:
    """The largest number of forward passes of chunks that wait for their backward pass on a pipeline rank."""
    passes = pipeline_schedule(
        stage=stage,
        stages=layout.pipeline,
        virtual=layout.virtual,
        microbatches=min(layout.microbatches_per_step, 2 * layout.pipeline),
    )
    return max(accumulate(direction for direction, _ in passes))


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
        expert_tensor=layout.expert_tensor,
    )
