"""All parameters of a rank in Megatron's order, and their layout in Megatron's buffers: exact to the byte.

    stage pattern --> Tensor, Tensor, ... --(by format, backwards, padded)--> buffers --> shards of the data-parallel ranks

The rules are those of Megatron-Core 0.19 (`optimizer/param_layout.py`, `DistributedOptimizer._compute_per_buffer_param_layout`,
`DistributedDataParallel`): parameters go from last to first, each starts at a multiple of 64 elements, a bucket ends at a
multiple of lcm(data-parallel ranks, 128), and a tied embedding has a bucket of its own.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from recipes.schema.encoders import encoder_weights
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import LayerKind, mtp_kinds, mtp_projection_weights
from recipes.schema.scaling import linear_shapes

PARAMETER_START = 64
BUCKET_END = 128


@dataclass(frozen=True)
class Tensor:
    """One parameter of a rank."""

    numel: int
    is_fp32: bool = False
    """Whether it is fp32 in every recipe: A_log, D and dt_bias."""
    is_shared: bool = False
    """Whether it is the embedding or head of a tied model with several stages; it then has a bucket of its own."""
    is_low: bool = False
    """Whether it is the weight of a linear layer that runs in low precision."""
    is_expert: bool = False
    """Whether it is a weight of routed experts, which have buffers of their own and other data-parallel ranks."""
    is_frozen: bool = False
    """Whether it is not trained (`model.lora`): no gradient, no optimizer state, no buffer."""
    is_matrix: bool = False
    """Whether Muon would update it: the matrices of layers."""


def stage_tensors(
    model: ModelConfig,
    pattern: str,
    *,
    tensor: int,
    expert: int = 1,
    expert_tensor: int = 1,
    is_first: bool,
    is_last: bool,
    stages: int = 1,
    low: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
    adapted: Mapping[int, tuple[str, ...]] | None = None,
) -> list[Tensor]:
    """Parameters of one model chunk on one tensor rank, in order. low: linears in low precision, by index in `pattern`; adapted:
    linears with an adapter, likewise: all other parameters are then frozen; None: nothing is."""
    if adapted is not None:
        whole = stage_tensors(
            model, pattern, tensor=tensor, expert=expert, expert_tensor=expert_tensor, is_first=is_first, is_last=is_last,
            stages=stages, low=low,
        )  # fmt: skip
        adapters = [
            one
            for index, names in sorted(adapted.items())
            for one in adapter_tensors(model, pattern[index], names, tensor=tensor)  # type: ignore[arg-type]
        ]
        return [replace(one, is_frozen=True) for one in whole] + adapters
    table = model.vocab // tensor * model.hidden
    has_depths = is_last and model.mtp.depths > 0
    shared = not model.has_own_head and stages > 1
    # Further depths need the embedding too: the last stage has a copy.
    is_copied = shared or (model.mtp.depths > 0 and stages > 1)
    found = [Tensor(table, is_shared=is_copied)] if is_first or has_depths else []
    for index, kind in enumerate(pattern):
        found += layer_tensors(
            model,
            kind,  # type: ignore[arg-type]
            tensor=tensor,
            expert=expert,
            expert_tensor=expert_tensor,
            low=low.get(index, ()),
        )
    if is_last:
        found.append(Tensor(model.hidden))
        found += depth_tensors(model, tensor=tensor, expert=expert, expert_tensor=expert_tensor) * model.mtp.sets
        if model.head == "scalar":
            found.append(Tensor(model.hidden))  # the same on every tensor rank
        elif model.has_own_head or not (is_first or has_depths):
            found.append(Tensor(table, is_shared=shared))
    if is_first:
        weights = encoder_weights(model.vision, model.audio, model.hidden).values()
        found += [Tensor(one.numel // (tensor if one.split else 1)) for one in weights]
    return found


def depth_tensors(model: ModelConfig, *, tensor: int, expert: int = 1, expert_tensor: int = 1) -> list[Tensor]:
    """Parameters of one further depth (`model.mtp`) on one rank; its layers are in high precision."""
    norm = Tensor(model.hidden)
    layers = [
        one
        for kind in mtp_kinds(model)
        for one in layer_tensors(model, kind, tensor=tensor, expert=expert, expert_tensor=expert_tensor)
    ]
    return [norm, norm, Tensor(mtp_projection_weights(model) // tensor, is_matrix=True), *layers, norm]


@lru_cache(maxsize=256)
def layer_tensors(
    model: ModelConfig,
    kind: LayerKind,
    *,
    tensor: int,
    expert: int = 1,
    expert_tensor: int = 1,
    low: tuple[str, ...] = (),
) -> list[Tensor]:
    """Parameters of one layer on one rank."""
    shapes = linear_shapes(model, kind, tensor=tensor, expert_tensor=expert_tensor)
    column, row, *shared = (
        Tensor(out * into, is_low=name in low, is_matrix=True) for name, (out, into) in shapes.items()
    )
    after = [Tensor(model.hidden)] if model.post_norms else []
    norm = Tensor(model.hidden)
    into, out = column, row
    match kind:
        case "M":
            heads = model.mamba_heads // tensor
            inner = heads * model.mamba_head_dim
            conv = inner + 2 * model.mamba_groups // tensor * model.mamba_state
            scan = [Tensor(heads, is_fp32=True)] * 3
            return [Tensor(conv * model.mamba_conv), Tensor(conv), *scan, into, Tensor(inner), out, norm, *after]
        case "-":
            return [norm, into, out, *after]
        case "E":
            here = model.experts.count // expert
            routed = [
                Tensor(here * one.numel, is_low=one.is_low, is_expert=True, is_matrix=True) for one in (column, row)
            ]
            latent = [Tensor(model.hidden * model.experts.latent, is_matrix=True)] * (2 if model.experts.latent else 0)
            router = Tensor(model.experts.count * model.hidden, is_matrix=True)
            return [norm, router, *latent, *routed, *shared, *after]
        case _:
            return [norm, out, into, *[Tensor(model.head_dim)] * (2 * model.qk_norm), *after]


def adapter_tensors(model: ModelConfig, kind: LayerKind, names: tuple[str, ...], *, tensor: int) -> list[Tensor]:
    """Parameters of the adapters (`model.lora`) of some linears of a layer on one rank, in order: `down` and `up` of each."""
    shapes, rank = linear_shapes(model, kind, tensor=tensor), model.lora.rank
    return [Tensor(rank * size) for name, (out, into) in shapes.items() if name in names for size in (into, out)]


@dataclass(frozen=True)
class Buffer:
    """The layout of the parameters of one format of one model chunk."""

    is_fp32: bool
    is_expert: bool
    numel: int
    """Elements including padding; the same for weights and fp32 gradients."""
    parameter_ranges: tuple[tuple[int, int], ...]
    """[start, end) of each parameter."""
    matrix_ranges: tuple[tuple[int, int], ...]
    """[start, end) of the matrices of layers among them."""
    buckets: tuple[tuple[int, int], ...]
    """[start, end) of each bucket, including padding."""

    def shard(self, rank: int, ranks: int) -> int:
        """Elements of parameters whose optimizer state is on data-parallel rank `rank` of `ranks` (padding has no state)."""
        return self._shard(self.parameter_ranges, rank, ranks)

    def shard_of_matrices(self, rank: int, ranks: int) -> int:
        """Those of matrices of layers."""
        return self._shard(self.matrix_ranges, rank, ranks)

    def _shard(self, parameters: tuple[tuple[int, int], ...], rank: int, ranks: int) -> int:
        total = 0
        for start, end in self.buckets:
            size = (end - start) // ranks
            low, high = start + rank * size, start + (rank + 1) * size
            # Ranges ascend: only those between the first that ends after `low` and the last that starts before `high` count.
            first = bisect_right(parameters, low, key=lambda one: one[1])
            last = bisect_left(parameters, high, key=lambda one: one[0])
            total += sum(min(high, b) - max(low, a) for a, b in parameters[first:last])
        return total


def buffers(
    tensors: list[Tensor], *, all_fp32: bool, shards: int, expert_shards: int = 1, bucket_numel: int | None
) -> list[Buffer]:
    """The buffers of a chunk's trained parameters, one for each format and for experts. shards: data-parallel x context ranks;
    expert_shards: ranks with the same experts; bucket_numel: None for one bucket."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for one in tensors:
        if one.is_frozen:
            continue
        groups.setdefault((one.is_fp32 or all_fp32, one.is_expert), []).append(one)
    return [
        _lay_out(kind, group, shards=expert_shards if kind[1] else shards, bucket_numel=bucket_numel)
        for kind, group in groups.items()
    ]


def bucket_size(*, data: int, overlap: bool, is_first_stage: bool, is_first_chunk: bool) -> int | None:
    """Elements after which Megatron closes a bucket; None for one bucket. data: data-parallel ranks without context ranks."""
    return max(40_000_000, 1_000_000 * data) if overlap and is_first_stage and is_first_chunk else None


def _lay_out(kind: tuple[bool, bool], tensors: list[Tensor], *, shards: int, bucket_numel: int | None) -> Buffer:
    divisor = math.lcm(shards, BUCKET_END)
    parameter_ranges: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    at = begin = 0
    in_bucket = 0

    def close(end: int) -> int:
        padded = -(-end // divisor) * divisor
        buckets.append((begin, padded))
        return padded

    for one in reversed(tensors):
        at = -(-at // PARAMETER_START) * PARAMETER_START
        if one.is_shared and in_bucket:
            at = begin = close(at)
            in_bucket = 0
        end = at + one.numel
        parameter_ranges.append((at, end))
        in_bucket += 1
        at = end
        if one.is_shared or (bucket_numel is not None and end - begin >= bucket_numel):
            at = begin = close(end)
            in_bucket = 0
    if in_bucket:
        close(at)
    matrices = tuple(at for at, one in zip(parameter_ranges, reversed(tensors), strict=True) if one.is_matrix)
    return Buffer(*kind, buckets[-1][1], tuple(parameter_ranges), matrices, tuple(buckets))
