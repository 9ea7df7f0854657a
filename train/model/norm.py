"""RMSNorm as a function and as the module that Megatron's specs need: built from (config, hidden_size, eps), usable under
sequence parallelism. On a CPU forward and backward each read memory once (`passes.c`)."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch.nn import functional as F

from train.native import passes


class _RMSNorm(torch.autograd.Function):
    """Saves the input and one number per line and group, not the normed output."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, groups: int
    ) -> torch.Tensor:
        if passes.usable(x):
            x = x.contiguous()
            out, roots = passes.norm_forward(x, weight, eps=eps, offset=offset, groups=groups)
        else:
            parts = _parts(x, groups)
            roots = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
            out = ((parts * roots).flatten(-2) * (offset + weight.to(parts.dtype))).to(x.dtype)
        ctx.save_for_backward(x, weight, roots)
        ctx.offset, ctx.groups = offset, groups
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, roots = ctx.saved_tensors
        if passes.usable(x):
            grad_x, grad_weight = passes.norm_backward(
                x, weight, roots, grad.contiguous(), offset=ctx.offset, groups=ctx.groups
            )
        else:
            parts = _parts(x, ctx.groups)
            normed = parts * roots
            wide = grad.to(parts.dtype)
            h = _parts(wide * (ctx.offset + weight.to(parts.dtype)), ctx.groups)
            grad_x = ((h - normed * (h * normed).mean(-1, keepdim=True)) * roots).flatten(-2).to(x.dtype)
            grad_weight = (wide * normed.flatten(-2)).flatten(0, -2).sum(0)
        return grad_x, grad_weight.to(weight.dtype), None, None, None


def _parts(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[..., groups, channels of a group], at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (groups, -1))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0, groups: int = 1
) -> torch.Tensor:
    """x / rms(x) * (offset + weight) over each of `groups` equal parts of the last dim (arXiv 1910.07467).

    x: [..., channels] -> the same shape and dtype; weight: [channels]; arithmetic is fp32 (float64 for float64).
    Differentiable once on a CPU.
    """
    if x.device.type == "cpu" or groups > 1:
        return _RMSNorm.apply(x, weight, eps, offset, groups)
    if offset == 0:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, offset + weight.float(), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight as a parameter; the factor is 1 + weight if the config sets
    `layernorm_zero_centered_gamma` (Gemma).

    Under sequence parallelism each tensor rank sees a part of the sequence, so the weight's gradient is a partial sum;
    the attribute `sequence_parallel` makes Megatron sum it over the tensor group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        fill = torch.zeros if self.offset else torch.ones
        self.weight = nn.Parameter(fill(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden] -> the same shape and dtype."""
        return rms_norm(x, self.weight, eps=self.eps, offset=self.offset)
