"""Parallel linear layers of the reference backend on a CPU: Megatron's, with a faster matrix product.

Megatron's ColumnParallelLinear and RowParallelLinear own the weight, its sharding, names and checkpoints, and call one
function for the product and its collectives. On a CPU `fast_linear` replaces that function. It multiplies in fp32
(`train.native.gemm`) for every storage dtype: on processors without bf16 instructions a bf16 product is about 50x slower
than fp32 (docs/log.md), so there bf16 only saves memory and traffic.
"""

from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from train.native.product_check import Multiply, multiplier_of, unchecked


class _Product(torch.autograd.Function):
    """y = x W^T in fp32, returned in x's dtype; gradients likewise. With a split sequence only this rank's part is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        group: dist.ProcessGroup | None,
        reduces: bool,
        splits: bool,
        multiply: Multiply,
    ) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.group, ctx.reduces, ctx.splits, ctx.multiply = group, reduces, splits, multiply
        whole = _gathered(x, group) if splits else x
        product = multiply("forward", _wide(_matrix(whole)), _wide(weight.t()))
        return product.to(x.dtype).view(*whole.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = _wide(_matrix(grad))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (
                ctx.multiply("data_grad", rows, _wide(weight)).to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
            )
            if ctx.splits:
                grad_x = _scattered(grad_x, ctx.group)
            elif ctx.reduces:
                dist.all_reduce(grad_x, group=ctx.group)
        if ctx.needs_input_grad[1]:
            whole = _gathered(x, ctx.group) if ctx.splits else x
            grad_weight = ctx.multiply("weight_grad", rows.t(), _wide(_matrix(whole))).to(weight.dtype)
        return grad_x, grad_weight, None, None, None, None


def _matrix(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gathered(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _scattered(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.contiguous(), group=group)
    return part


def fast_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: None = None,
    wgrad_deferral_limit: int | None = 0,
    tp_group: dist.ProcessGroup | None = None,
    gtp_remat_size: int = 1,
    *,
    multiply: Multiply = unchecked,
) -> torch.Tensor:
    """Same contract as Megatron's `linear_with_grad_accumulation_and_async_allreduce` and `linear_with_frozen_weight`.

    input: [sequence, rows, in] (with `sequence_parallel`: this rank's part) -> [sequence, rows, out of this rank].
    Collective over `tp_group` in forward (`sequence_parallel`) and backward (either flag).
    """
    assert not gradient_accumulation_fusion and grad_output_buffer is None and gtp_remat_size == 1, (
        "fast_linear supports neither fused gradient accumulation, deferred weight gradients nor gtp"
    )
    output = _Product.apply(input, weight, tp_group, allreduce_dgrad, sequence_parallel, multiply)
    return output if bias is None else output + bias


def plain_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T of a weight that is whole on this rank, without collectives; on a CPU at least in fp32."""
    if x.device.type != "cpu":
        return torch.nn.functional.linear(x, weight)
    product: torch.Tensor = _Product.apply(x, weight, None, False, False, unchecked)
    return product


def use_fast_product(module: torch.nn.Module) -> None:
    """Make every parallel linear layer in `module` use `fast_linear` with its check, if it has one; on a CPU only."""
    first = next(module.parameters(), None)
    if first is None or first.device.type != "cpu":
        return
    for part in module.modules():
        if isinstance(part, ColumnParallelLinear | RowParallelLinear):
            multiply = multiplier_of(part)
            part._forward_impl = fast_linear if multiply is unchecked else partial(fast_linear, multiply=multiply)


class WeightSource(Protocol):
    """Gives the weight that a linear layer multiplies by, at each call."""

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight [out of this rank, in of this rank]. stored: the layer's own parameter, which may be a placeholder."""
        ...


def take_weight_from(linear: torch.nn.Module, source: WeightSource) -> None:
    """Make a parallel linear layer multiply by `source.weight(its parameter)`. Product and collectives stay as they are."""
    plain = linear._forward_impl

    def product(input: torch.Tensor, weight: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return plain(input=input, weight=source.weight(weight), **arguments)  # type: ignore[operator]

    linear._forward_impl = product  # type: ignore[assignment]
