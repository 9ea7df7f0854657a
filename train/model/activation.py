"""Nonlinearities of the MLP layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        rectified = torch.relu(x)
        ctx.save_for_backward(rectified)
        return rectified * rectified

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (rectified,) = ctx.saved_tensors
        return (grad * rectified).mul_(2)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (arXiv 2109.08668), with a gradient of two passes instead of autograd's five."""
    return _SquaredReLU.apply(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation (arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


def activation_function(name: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """(function, whether it gates a second branch) of a recipe's `model.activation`."""
    return {
        "squared_relu": (squared_relu, False),
        "gelu": (gelu_tanh, False),
        "silu": (F.silu, False),
        "swiglu": (F.silu, True),
        "geglu": (gelu_tanh, True),
    }[name]
