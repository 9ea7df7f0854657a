"""Which boxes of which tensors this rank's model and optimizer hold: Megatron's sharding, said as plain boxes.

    model.NAME                   weights and buffers, whole-model names, fused projections by component
    optimizer.master.NAME        fp32 master of a weight, where the weight itself is not fp32
    optimizer.exp_avg.NAME       first moment            optimizer.exp_avg_sq.NAME   second moment

Megatron's `sharded_state_dict` says where a weight's local part lies in the whole and how fused projections fall apart. Its
distributed optimizer gives each data-parallel rank a run of elements of each flattened local weight. Such a run, cut at
the components' borders, is a few boxes: one optimizer state needs no gathering and has a place in the whole tensor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer

from recipes.schema.errors import CheckpointError
from train.checkpoint.files import Piece, boxes_of_run

MODEL, MASTER = "model.", "optimizer.master."
MOMENTS = ("exp_avg", "exp_avg_sq")

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False}


@dataclass(frozen=True)
class Component:
    """A block of elements of a local tensor and the box of a whole tensor that it is."""

    name: str
    """Whole-model name, without a section."""
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    """First element in the flattened local tensor."""


@dataclass(frozen=True)
class Local:
    """A parameter or buffer of this rank and what it is of the whole model."""

    data: torch.Tensor
    """Ordinary numbers, contiguous."""
    source: torch.Tensor
    """What the module holds: `data` itself, or a weight kept in FP8 of which `data` is the decoded copy."""
    components: list[Component]
    is_counted: bool
    """Whether it counts for the whole: false for a copy another tensor or pipeline rank holds (norms, tied embeddings)."""
    data_replica: int
    """Index among the data-parallel (and context) ranks that hold the same."""
    is_trained: bool
    """Whether an optimizer has its state."""


@dataclass(frozen=True)
class OptimizerPart:
    """What this rank's optimizer keeps of one parameter: elements `start` up to `end` of the flattened local weight."""

    local: Local
    parameter: torch.nn.Parameter
    start: int
    end: int
    master: torch.Tensor
    """fp32, [end - start]; shares the weight's memory where that is fp32."""
    moments: dict[str, torch.Tensor]
    group: dict[str, Any]
    """The optimizer's own: lr, weight_decay, betas, eps, step."""

    @property
    def has_master(self) -> bool:
        """Whether the master is another number than the weight."""
        return self.master.untyped_storage().data_ptr() != self.parameter.untyped_storage().data_ptr()


def locals_of(modules: Sequence[Any], data_group: Any) -> dict[str, Local]:
    """Parameters and persistent buffers of unwrapped model chunks, by (chunk index and) local name.

    data_group: the data-parallel ranks, context ranks included. Raises CheckpointError for state that is not a tensor.
    """
    found: dict[str, Local] = {}
    for index, module in enumerate(modules):
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        state = module.sharded_state_dict(metadata={**_METADATA, "dp_cp_group": data_group})
        for key, value in state.items():
            if isinstance(value, ShardedObject):
                _refuse_pickled(value)
                continue
            found[f"{index}/{key}"] = _local(value, is_trained=key in trained)
    return found


def owned_pieces(locals_: dict[str, Local], parts: Sequence[OptimizerPart] | None) -> list[Piece]:
    """What this rank writes: every element of the model and its optimizer is in one rank's pieces, once.

    Of a weight a rank writes the run whose optimizer state it holds; of a buffer, or without an optimizer (None), the first
    replica all of it.
    """
    pieces: list[Piece] = []
    for part in parts or ():
        if part.local.is_counted:
            pieces += [piece for group in part_pieces(part).values() for piece in group]
    for local in locals_.values():
        is_shared_out = parts is not None and local.is_trained
        if not is_shared_out and local.is_counted and local.data_replica == 0:
            pieces += _cut(MODEL, local, local.data.reshape(-1), 0)
    return pieces


def part_pieces(part: OptimizerPart) -> dict[str, list[Piece]]:
    """Pieces of this rank's run of a parameter: `weight`, `master` where that is another number, and the moments."""
    weight = part.local.data.reshape(-1)[part.start : part.end]
    pieces = {"weight": _cut(MODEL, part.local, weight, part.start)}
    if part.has_master:
        pieces["master"] = _cut(MASTER, part.local, part.master, part.start)
    for name, values in part.moments.items():
        pieces[name] = _cut(f"optimizer.{name}.", part.local, values, part.start)
    return pieces


def copied_pieces(parts: Sequence[OptimizerPart]) -> list[Piece]:
    """This rank's runs of weights that another tensor or pipeline rank writes (norms, tied embeddings) but that this one trains
    too: equal to the bit as long as nothing went wrong."""
    return [piece for part in parts if not part.local.is_counted for piece in part_pieces(part)["weight"]]


def weight_pieces(locals_: dict[str, Local]) -> list[Piece]:
    """Every local weight and buffer, whole."""
    return [piece for local in locals_.values() for piece in _cut(MODEL, local, local.data.reshape(-1), 0)]


def optimizer_pieces(parts: Sequence[OptimizerPart]) -> list[Piece]:
    """Masters (where they are not the weights) and moments of this rank's optimizer."""
    return [
        piece for part in parts for name, pieces in part_pieces(part).items() for piece in pieces if name != "weight"
    ]


def optimizer_parts(
    optimizer: MegatronOptimizer, modules: Sequence[Any], locals_: dict[str, Local]
) -> list[OptimizerPart]:
    """What this rank's distributed optimizer holds of each parameter, in the order of the model's names."""
    names = {
        parameter: locals_[f"{index}/{name}"]
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if f"{index}/{name}" in locals_
    }
    parts = {}
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
                moments={name: state[name] for name in MOMENTS},
                group=group,
            )
    return [parts[parameter] for parameter in names if parameter in parts]


def _cut(section: str, local: Local, values: torch.Tensor, start: int) -> list[Piece]:
    """Pieces of `values`, elements from `start` on of the flattened local tensor."""
    pieces = []
    end = start + values.numel()
    for component in local.components:
        low = max(start, component.start) - component.start
        high = min(end, component.start + math.prod(component.shape)) - component.start
        for offset, shape, first in boxes_of_run(component.shape, low, high):
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


def _local(value: ShardedTensor | ShardedTensorFactory, *, is_trained: bool) -> Local:
    source = value.data.detach()
    # A weight kept in FP8 between steps is decoded (not run: needs a GPU).
    data = source if type(source) is torch.Tensor else source.dequantize()
    parts = [value] if isinstance(value, ShardedTensor) else list(nested_values(replace(value, data=data).build()))
    replica = value.replica_id if isinstance(value.replica_id, tuple) else (0, 0, value.replica_id)
    components = []
    for part in parts:
        assert not part.prepend_axis_num and part.flattened_range is None, f"{part.key}: one tensor a layer"
        start = part.data.storage_offset() - data.storage_offset() if part is not value else 0
        components.append(
            Component(part.key, tuple(part.global_shape), tuple(part.global_offset), tuple(part.local_shape), start)
        )
    assert data.is_contiguous(), f"{value.key}: filled in place"
    assert sum(math.prod(c.shape) for c in components) == data.numel(), f"{value.key}: its components are not the whole"
    return Local(data, source, components, not any(replica[:-1]), replica[-1], is_trained)


def _refuse_pickled(value: ShardedObject) -> None:
    data = value.data
    if data is None or (isinstance(data, torch.Tensor) and data.numel() == 0):
        return
    raise CheckpointError(
        f"{value.key} is state of kind {type(data).__name__}, which only a pickle could hold; checkpoints hold tensors. Keep "
        f"it in a buffer."
    )
