"""Which boxes of which tensors are on this rank: Megatron's sharding of model and optimizer, expressed as plain boxes.

    model.NAME                   weights and buffers, whole-model names, fused projections by component
    optimizer.master.NAME        fp32 master of a weight that is not fp32 itself
    optimizer.exp_avg.NAME       first moment            optimizer.exp_avg_sq.NAME   second moment (AdamW only)

Megatron's `sharded_state_dict` gives a local weight's offset in the whole tensor and the components of fused projections. Its
distributed optimizer gives each data-parallel rank a contiguous range of each flattened local weight. Split at component
boundaries, such a range is a few boxes of whole tensors, so optimizer state is saved without gathering it.
"""

import train.megatron  # noqa: F401  prepares Megatron before the imports below

# isort: split
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer

from recipes.schema.errors import CheckpointError
from train.checkpoint.files import Piece, boxes_of_range
from train.checkpoint.manifest import MASTER, MODEL

MOMENTS = ("exp_avg", "exp_avg_sq")

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False}


@dataclass(frozen=True)
class Component:
    """A contiguous block of a local tensor, and the box of the whole tensor that it corresponds to."""

    name: str
    """Whole-model name, without the `model.` or `optimizer.` prefix."""
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    """First element in the flattened local tensor."""


@dataclass(frozen=True)
class LocalTensor:
    """A parameter or buffer of this rank, and the parts of the whole model that it contains."""

    data: torch.Tensor
    """A plain contiguous tensor."""
    source: torch.Tensor
    """The module's own tensor: `data` itself, or an FP8 weight that `data` is the decoded copy of."""
    components: list[Component]
    is_counted: bool
    """Whether this rank's copy is the one that is saved. False for copies of norms and tied embeddings that another tensor or
    pipeline rank saves."""
    data_replica: int
    """Index among the data-parallel (and context) ranks with the same tensor."""
    is_trained: bool
    """Whether it has optimizer state."""


@dataclass(frozen=True)
class OptimizerPart:
    """This rank's optimizer state of one parameter: elements [start, end) of the flattened local weight."""

    local: LocalTensor
    parameter: torch.nn.Parameter
    start: int
    end: int
    master: torch.Tensor
    """fp32, [end - start]; shares the weight's memory if the weight is fp32."""
    moments: dict[str, torch.Tensor]
    group: dict[str, Any]
    """The optimizer's parameter group: lr, weight_decay, betas, eps, step."""
    largest_update: torch.Tensor | None = None
    """Muon only: the largest element of the last update, before the learning rate. None before the first step."""

    @property
    def has_master(self) -> bool:
        """Whether the master is stored separately from the weight."""
        return self.master.untyped_storage().data_ptr() != self.parameter.untyped_storage().data_ptr()


def local_tensors_of(modules: Sequence[Any], data_group: Any) -> dict[str, LocalTensor]:
    """Parameters and persistent buffers of unwrapped model chunks, by (chunk index and) local name.

    data_group: the data-parallel ranks, context ranks included. Raises CheckpointError for state that is not a tensor.
    """
    found: dict[str, LocalTensor] = {}
    for index, module in enumerate(modules):
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        state = module.sharded_state_dict(metadata={**_METADATA, "dp_cp_group": data_group})
        for key, value in state.items():
            if isinstance(value, ShardedObject):
                _refuse_pickled(value)
                continue
            found[f"{index}/{key}"] = _local(value, is_trained=key in trained)
    return found


def owned_pieces(local_tensors: dict[str, LocalTensor], parts: Sequence[OptimizerPart]) -> list[Piece]:
    """The pieces that this rank writes. All ranks together write each element of the model and its optimizer exactly once.

    A rank writes the range of a weight whose optimizer state it has. The first replica writes buffers whole.
    """
    pieces: list[Piece] = []
    for part in parts:
        if part.local.is_counted:
            pieces += [piece for group in part_pieces(part).values() for piece in group]
    for local in local_tensors.values():
        if not local.is_trained and local.is_counted and local.data_replica == 0:
            pieces += _cut(MODEL, local, local.data.reshape(-1), 0)
    return pieces


def resident_pieces(local_tensors: dict[str, LocalTensor], parts: Sequence[OptimizerPart]) -> list[Piece]:
    """What this rank needs to continue at the same layout: like `owned_pieces`, but also the copies that another rank writes.

    A weight's ranges that other data-parallel ranks update are not included: they are gathered from these ranks.
    """
    pieces = [piece for part in parts for group in part_pieces(part).values() for piece in group]
    for local in local_tensors.values():
        if not local.is_trained:
            pieces += _cut(MODEL, local, local.data.reshape(-1), 0)
    return pieces


def part_pieces(part: OptimizerPart) -> dict[str, list[Piece]]:
    """Pieces of this rank's range of a parameter: `weight`, `master` if it is stored separately, and the moments."""
    weight = part.local.data.reshape(-1)[part.start : part.end]
    pieces = {"weight": _cut(MODEL, part.local, weight, part.start)}
    if part.has_master:
        pieces["master"] = _cut(MASTER, part.local, part.master, part.start)
    for name, values in part.moments.items():
        pieces[name] = _cut(f"optimizer.{name}.", part.local, values, part.start)
    return pieces


def copied_pieces(parts: Sequence[OptimizerPart]) -> list[Piece]:
    """This rank's ranges of weights that it trains too, but that another tensor or pipeline rank writes (norms, tied embeddings).
    The copies are bitwise equal unless there is a fault."""
    return [piece for part in parts if not part.local.is_counted for piece in part_pieces(part)["weight"]]


def weight_pieces(local_tensors: dict[str, LocalTensor]) -> list[Piece]:
    """Every local weight and buffer, whole."""
    return [piece for local in local_tensors.values() for piece in _cut(MODEL, local, local.data.reshape(-1), 0)]


def optimizer_pieces(parts: Sequence[OptimizerPart]) -> list[Piece]:
    """Separate masters and the moments of this rank's optimizer."""
    return [
        piece for part in parts for name, pieces in part_pieces(part).items() for piece in pieces if name != "weight"
    ]


def optimizer_parts(
    optimizer: MegatronOptimizer, modules: Sequence[Any], local_tensors: dict[str, LocalTensor]
) -> list[OptimizerPart]:
    """This rank's distributed optimizer state of each parameter, in the order of the model's names."""
    names = {
        parameter: local_tensors[f"{index}/{name}"]
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if f"{index}/{name}" in local_tensors
    }
    parts = {}
    # Megatron chains one optimizer for each kind of parameter. One without parameters on this rank has no buffer map. Its
    # accessors for ranges and state are private; there are no public ones.
    for piece in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in getattr(piece, "model_param_gbuf_map", {}):
            run = piece._get_model_param_range_map(parameter)["param"]
            state = dict(piece._get_main_param_and_optimizer_states(parameter))
            group = piece.optimizer.param_groups[piece.model_param_group_index_map[parameter][0]]
            parts[parameter] = OptimizerPart(
                local=names[parameter],
                parameter=parameter,
                start=run.start,
                end=run.end,
                master=state.pop("param").detach(),
                moments={name: state[name] for name in MOMENTS if name in state},
                group=group,
                largest_update=state.get("largest_update"),
            )
    return [parts[parameter] for parameter in names if parameter in parts]


def _cut(section: str, local: LocalTensor, values: torch.Tensor, start: int) -> list[Piece]:
    """Pieces of `values`, which are elements of the flattened local tensor from `start` on."""
    pieces = []
    end = start + values.numel()
    for component in local.components:
        low = max(start, component.start) - component.start
        high = min(end, component.start + math.prod(component.shape)) - component.start
        for offset, shape, first in boxes_of_range(component.shape, low, high):
            at = component.start + first - start
            pieces.append(
                Piece(
                    tensor=section + component.name,
                    whole=component.whole,
                    offset=tuple(o + p for o, p in zip(component.offset, offset, strict=True)),
                    shape=shape,
                    data=values[at : at + math.prod(shape)],
                )
            )
    return pieces


def _local(value: ShardedTensor | ShardedTensorFactory, *, is_trained: bool) -> LocalTensor:
    source = value.data.detach()
    # An FP8 weight (Transformer Engine) is decoded first. Not tested: needs a GPU.
    data = source if type(source) is torch.Tensor else source.dequantize()
    parts = [value] if isinstance(value, ShardedTensor) else list(nested_values(replace(value, data=data).build()))
    # Megatron's replica id is (pipeline, tensor, data) or the data-parallel index alone. The copy to save has zeros in front.
    replica = value.replica_id if isinstance(value.replica_id, tuple) else (0, 0, value.replica_id)
    components = []
    for part in parts:
        assert not part.prepend_axis_num and part.flattened_range is None, f"{part.key}: expected one tensor per layer"
        start = part.data.storage_offset() - data.storage_offset() if part is not value else 0
        components.append(
            Component(part.key, tuple(part.global_shape), tuple(part.global_offset), tuple(part.local_shape), start)
        )
    assert data.is_contiguous(), f"{value.key}: must be contiguous, because loading fills it in place"
    assert sum(math.prod(c.shape) for c in components) == data.numel(), f"{value.key}: its components are not the whole"
    return LocalTensor(data, source, components, not any(replica[:-1]), replica[-1], is_trained)


def _refuse_pickled(value: ShardedObject) -> None:
    data = value.data
    if data is None or (isinstance(data, torch.Tensor) and data.numel() == 0):
        return
    raise CheckpointError(
        f"{value.key} is a {type(data).__name__}. Checkpoints store only tensors, because other objects would need pickle. Make "
        f"it a buffer."
    )
