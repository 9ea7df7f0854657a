"""The activation functions of MLP layers, gated or not, and the MLP that applies them.

On a CPU forward and backward each read memory once (`passes.c`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.transformer.mlp import MLP
from torch.nn import functional as F

from train.native import passes

Function = Literal["squared_relu", "gelu", "silu"]


class _Activation(torch.autograd.Function):
    """Saves only the input: the backward pass computes the activation again instead of storing it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: Function, gated: bool) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.function, ctx.gated = function, gated
        if passes.usable(x):
            return passes.activation_forward(x, function, gated=gated)
        if not gated:
            return _forward(function, x)
        gate, up = x.chunk(2, dim=-1)
        return _forward(function, gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if passes.usable(x):
            return passes.activation_backward(x, grad.contiguous(), ctx.function, gated=ctx.gated), None, None
        if not ctx.gated:
            return _backward(ctx.function, grad, x), None, None
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(grad, _forward(ctx.function, gate), out=grad_up)
        grad_gate.copy_(_backward(ctx.function, grad * up, gate))
        return grad_x, None, None


def _forward(function: Function, x: torch.Tensor) -> torch.Tensor:
    match function:
        case "squared_relu":
            return torch.relu(x).square_()
        case "gelu":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)


def _backward(function: Function, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    match function:
        case "squared_relu":
            return (grad * torch.relu(x)).mul_(2)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)


def activate(x: torch.Tensor, function: Function, gated: bool) -> torch.Tensor:
    """f(x), or f(gate) * up if gated (the last dim of x is then [gate | up]). Differentiable once.

    squared_relu: max(x, 0)^2 (arXiv 2109.08668). gelu: the tanh approximation (arXiv 1606.08415, section 2).
    """
    return _Activation.apply(x, function, gated)


def activation_function(name: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """For a recipe's `model.activation`: (function of `FeedForward`'s whole inner layer, whether that is [gate | up])."""
    functions: dict[str, tuple[Function, bool]] = {
        "squared_relu": ("squared_relu", False),
        "gelu": ("gelu", False),
        "silu": ("silu", False),
        "swiglu": ("silu", True),
        "geglu": ("gelu", True),
    }
    function, gated = functions[name]
    return partial(activate, function=function, gated=gated), gated


class FeedForward(MLP):
    """Megatron's MLP with an activation that takes gate and up together.

    Megatron's own forward pass applies the activation to the gate and multiplies afterwards: one more pass over memory.
    """

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[sequence, rows, hidden] -> the same shape. The two linear layers are collective over the tensor group."""
        assert per_token_scale is None, (
            "per_token_scale is for Megatron's experts; this project's weigh their outputs (train.model.experts)"
        )
        inner, bias = self.linear_fc1(hidden_states)
        assert bias is None, "layers here have no biases"
        return self.linear_fc2(self.config.activation_func(inner))
