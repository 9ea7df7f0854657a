"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685): the weights of the model are frozen, the adapters are trained.

    y = W x + (alpha / rank) up (down x)        down [rank, inputs], up [outputs, rank]; up starts at zero

How an adapter is split over the tensor ranks follows its linear, and every collective has only `rank` numbers a token:

    column (outputs split):  h = down x, the same on every rank   --> this rank's rows of up
    row (inputs split):      h = sum over ranks of (this rank's columns of down) x   --> up, the same on every rank

An adapter is a module next to its linear (`mixer.in_proj_adapter`), so the linear keeps its class, names and kernels. `up` is
split into the same components as the linear's weight (z, x, B, C, dt of `in_proj`; the branches of a gated MLP), so any layout
reads it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from recipes.schema.lora import SUFFIX, adapted_linears
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds
from train.model.linear import plain_product

_MAMBA_PARTS = ["z", "x", "B", "C", "dt"]
"""Megatron's names of the components of `in_proj`, in its order."""


class Adapter(nn.Module):
    """The adapter of one parallel linear layer."""

    def __init__(
        self, linear: Any, *, rank: int, factor: float, splits_outputs: bool, group: dist.ProcessGroup, sequence: bool
    ) -> None:
        """linear: built; its weight is [outputs, inputs] of this rank. factor: multiplies the adapter's output. splits_outputs:
        whether the linear is column-parallel. sequence: whether hidden states are split along the sequence."""
        super().__init__()
        weight = linear.weight
        outputs, inputs = weight.shape
        options = {"dtype": weight.dtype, "device": weight.device}
        self.down = nn.Parameter(torch.empty(rank, inputs, **options))
        self.up = nn.Parameter(torch.empty(outputs, rank, **options))
        self.factor, self.splits_outputs, self.group, self.sequence = factor, splits_outputs, group, sequence
        split, whole = (self.up, self.down) if splits_outputs else (self.down, self.up)
        # Megatron's marks: gradient norms count a split tensor on every rank and a whole one once, and the gradient of a whole
        # one is summed over the tensor ranks if each of them saw another part of the sequence.
        split.tensor_model_parallel = True  # type: ignore[attr-defined]
        split.partition_dim = 0 if splits_outputs else 1  # type: ignore[attr-defined]
        split.partition_stride = getattr(weight, "partition_stride", 1)  # type: ignore[attr-defined]
        if hasattr(weight, "partition_sizes"):
            split.partition_sizes = weight.partition_sizes  # type: ignore[attr-defined]
        if sequence:
            whole.sequence_parallel = True  # type: ignore[attr-defined]

    def forward(self, x_SBI: torch.Tensor) -> torch.Tensor:
        """Inputs of the linear -> what is added to its output, split as it is. Collective over the tensor group, backward too."""
        hidden_SBR = plain_product(x_SBI, self.down)
        if self.splits_outputs and self.sequence:
            hidden_SBR = gather_from_sequence_parallel_region(hidden_SBR, group=self.group)
        elif self.splits_outputs:
            hidden_SBR = copy_to_tensor_model_parallel_region(hidden_SBR, group=self.group)
        elif self.sequence:
            hidden_SBR = reduce_scatter_to_sequence_parallel_region(hidden_SBR, group=self.group)
        else:
            hidden_SBR = reduce_from_tensor_model_parallel_region(hidden_SBR, group=self.group)
        return self.factor * plain_product(hidden_SBR, self.up)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's description of both tensors; `up` in components, as the linear's weight."""
        assert metadata is not None
        data = metadata["dp_cp_group"]
        axes = {"up": 0} if self.splits_outputs else {"down": 1}
        found = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=data,
        )
        up = f"{prefix}up"
        if (sizes := getattr(self.up, "partition_sizes", None)) is not None:
            found[up] = _split_tensor_factory(found[up], list(sizes), _MAMBA_PARTS, 0)
        elif getattr(self.up, "partition_stride", 1) == 2:
            found[up] = apply_swiglu_sharded_factory(
                found[up], sharded_offsets, metadata.get("singleton_local_shards", False), self.group, data
            )
        return found


def attach_adapters(chunk: Any, model: ModelConfig) -> None:
    """Give the linears that `model.lora` names an adapter, and freeze all other weights of a freshly built chunk."""
    chosen = adapted_linears(model.lora, layer_kinds(model.pattern))
    if not chosen:
        return
    chunk.requires_grad_(False)
    config, group = chunk.config, chunk.pg_collection.tp
    for layer in chunk.decoder.layers:
        for name in chosen.get(layer.layer_number - 1, ()):
            parent, _, last = name.rpartition(".")
            linear = layer.get_submodule(name)
            adapter = Adapter(
                linear,
                rank=model.lora.rank,
                factor=model.lora.alpha / model.lora.rank,
                splits_outputs=last in ("in_proj", "linear_qkv", "linear_fc1"),
                group=group,
                sequence=config.sequence_parallel,
            )
            layer.get_submodule(parent).add_module(last + SUFFIX, adapter)
            linear.register_forward_hook(_Add(adapter))
    if hasattr(chunk, "embedding"):
        # Without a gradient at its input, a recomputed layer has none at its output: its adapters would learn nothing.
        chunk.embedding.register_forward_hook(_needs_gradient)


class _Add:
    """Adds an adapter's output to that of its linear. Not a method of the adapter: it must not be a submodule of the linear."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __call__(self, _linear: nn.Module, inputs: Sequence[torch.Tensor], output: Any) -> Any:
        product, bias = output
        return product + self._adapter(inputs[0]), bias


def _needs_gradient(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output
