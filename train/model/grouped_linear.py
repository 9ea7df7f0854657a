"""The matrices of all experts of a rank as one weight, and their products as one autograd function.

    rows of expert 0 | rows of expert 1 | ...      [tokens, in] x weight [experts, out, in] -> [tokens, out]

Rows are sorted by expert; `counts` says how many each has. Checkpoints store one tensor for all experts, split over the expert
ranks along its first dim, so that any degree can load what another one saved.
"""

from typing import Any, Literal, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer import TransformerConfig
from torch import nn

from train.native.gemm import Multiply, multiply_groups, unchecked
from train.native.product_check import multiplier_of


class Product(Protocol):
    """The products of all experts of this rank."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, counts: list[int], *, multiply: Multiply = unchecked
    ) -> torch.Tensor:
        """x [tokens, in], sorted by expert; weight [experts, out, in]; counts: rows of each expert -> [tokens, out]."""
        ...


class _GroupedProduct(torch.autograd.Function):
    """y = x W_e^T for the rows of each expert e, in fp32, returned in x's dtype; gradients likewise."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: list[int], multiply: Multiply) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.counts, ctx.multiply = counts, multiply
        return multiply_groups(x, weight.transpose(1, 2), counts, multiply=multiply)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply_groups(grad, weight, ctx.counts, multiply=ctx.multiply, product="data_grad")
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad, x, weight=weight, counts=ctx.counts, multiply=ctx.multiply)
        return grad_x, grad_weight, None, None


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, *, weight: torch.Tensor, counts: list[int], multiply: Multiply
) -> torch.Tensor:
    """[experts, out, in]: grad^T x over the rows of each expert; 0 for an expert without rows."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = zip(grad.split(counts), x.split(counts), strict=True)
    found = torch.stack(
        [
            multiply(f"expert {index} weight_grad", part.to(wide).t(), rows.to(wide))
            for index, (part, rows) in enumerate(parts)
        ]
    )
    return found.to(weight.dtype)


def grouped_product(
    x: torch.Tensor, weight: torch.Tensor, counts: list[int], *, multiply: Multiply = unchecked
) -> torch.Tensor:
    """The products of all experts of this rank in high precision. x: [tokens, in], sorted by expert -> [tokens, out]."""
    return _GroupedProduct.apply(x, weight, counts, multiply)


class GroupedLinear(nn.Module):
    """One linear layer of each expert of this rank, without biases.

    weight: [experts of this rank, branches, out, in], without the dim of branches if there is one. `split` says along which of
    out and in the expert-tensor ranks divide it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        inputs: int,
        outputs: int,
        branches: int = 1,
        split: Literal["out", "in"],
        groups: Any,
    ) -> None:
        """inputs, outputs: widths of the whole matrix (of one branch). groups: Megatron's process groups."""
        super().__init__()
        self.groups = groups
        tensor, ranks = groups.expt_tp.size(), groups.ep.size()
        assert config.num_moe_experts is not None
        experts = config.num_moe_experts // ranks
        rows, columns = (outputs // tensor, inputs) if split == "out" else (outputs, inputs // tensor)
        shape = (experts, rows, columns) if branches == 1 else (experts, branches, rows, columns)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.split_dim = len(shape) - (2 if split == "out" else 1)
        self.experts = experts
        self.first_expert = groups.ep.rank() * experts
        # For Megatron's DDP and optimizer: a weight of experts at every degree, also 1, so that the optimizer has the same parts
        # at every layout. Its gradient is reduced over the ranks with the same experts, and each rank's part counts in the norm.
        self.weight.allreduce = False  # type: ignore[attr-defined]
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.part_of_experts = self  # type: ignore[attr-defined]
        self._forward_impl: Product = grouped_product

    @property
    def whole_shape(self) -> list[int]:
        """Shape of one expert's weight on all expert-tensor ranks together."""
        shape = list(self.weight.shape[1:])
        shape[self.split_dim - 1] *= self.groups.expt_tp.size()
        return shape

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This expert-tensor rank's part of one expert's whole weight."""
        return whole.chunk(self.groups.expt_tp.size(), self.split_dim - 1)[self.groups.expt_tp.rank()]

    def forward(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """x: [tokens, in], sorted by expert; counts: rows of each expert of this rank -> [tokens, branches x out]."""
        return self._forward_impl(x, self.weight.flatten(1, -2), counts, multiply=multiplier_of(self))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each tensor as a part of the tensor of all experts; buffers (states of low precision) are equal on all ranks."""
        groups = self.groups
        offsets = [(0, groups.ep.rank(), groups.ep.size())]
        offsets += [(self.split_dim, groups.expt_tp.rank(), groups.expt_tp.size())] * (groups.expt_tp.size() > 1)
        key = f"{prefix}weight"
        found = {
            key: ShardedTensor.from_rank_offsets(key, self.weight, *offsets, replica_id=(0, 0, groups.expt_dp.rank()))
        }
        for name, buffer in self.named_buffers():
            key = f"{prefix}{name}"
            copy = (0, groups.ep.rank() * groups.expt_tp.size() + groups.expt_tp.rank(), groups.expt_dp.rank())
            found[key] = ShardedTensor.from_rank_offsets(key, buffer, replica_id=copy)
        return found
