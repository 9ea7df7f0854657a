"""Parallel linear layers of the reference backend: Megatron's, with a product that is fast on a CPU in bf16 too.

Megatron's ColumnParallelLinear and RowParallelLinear own the weight, its sharding, names and checkpoints, and call one
function for the product and its collectives. On a CPU a native bf16 matrix product is about 50x slower than fp32
(docs/log.md), so there `upcast_linear` takes that function's place: bf16 storage and traffic, fp32 multiplication.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class _UpcastProduct(torch.autograd.Function):
    """y = x W^T in fp32, stored in x's dtype; so are both gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.matmul(x.float(), weight.float().t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).float()
        grad_x = torch.matmul(rows, weight.float()).to(x.dtype).view(x.shape)
        grad_weight = torch.matmul(rows.t(), x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        return grad_x, grad_weight


def upcast_linear(
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
) -> torch.Tensor:
    """Same contract as Megatron's `linear_with_grad_accumulation_and_async_allreduce`, multiplying in fp32.

    input: [sequence, rows, in] (its part of the sequence with `sequence_parallel`) -> [sequence, rows, out of this rank].
    Collective over `tp_group` in forward (`sequence_parallel`) and backward (either flag).
    """
    assert not gradient_accumulation_fusion and grad_output_buffer is None and gtp_remat_size == 1, "not used here"
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = _UpcastProduct.apply(input, weight)
    return output if bias is None else output + bias


def use_fast_product(module: torch.nn.Module) -> None:
    """Give every parallel linear inside `module` that holds bf16 weights on a CPU the fp32 product."""
    for part in module.modules():
        if isinstance(part, ColumnParallelLinear | RowParallelLinear):
            weight = part.weight
            if weight is not None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
                part._forward_impl = upcast_linear
