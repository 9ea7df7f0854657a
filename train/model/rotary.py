"""Rotary positions (arXiv 2104.09864), with the scalings for rows longer than those a model was trained on.

    x_SBHD, positions_S --> x with channels (i, i + D/2) of each head rotated by position / base^(2i/D)

Scalings change the angle per token of each pair of channels, once, when the model is built:

    linear   every angle / factor (arXiv 2306.15595)
    llama3   slow pairs / factor, fast pairs unchanged, a blend by wave length between (arXiv 2407.21783, released code)
    yarn     the same with a ramp over the pair's index, and scores times (0.1 ln(factor) + 1)^2 (arXiv 2309.00071)

One `Rotary` is shared by all layers of a model; it caches the cosines and sines of the positions seen so far.
"""

import math
from typing import Any

import torch

from recipes.schema.model import ModelConfig

YARN_FAST, YARN_SLOW = 32.0, 1.0
"""Full rotations within the original row: pairs with more are unchanged, pairs with fewer than the second number are divided
by the factor (arXiv 2309.00071, 3.2)."""
LLAMA3_FAST, LLAMA3_SLOW = 4.0, 1.0
"""The same for `llama3`: high_freq_factor and low_freq_factor of the released models."""


def angles_per_token(model: ModelConfig) -> torch.Tensor:
    """Rotation angle of each pair of channels per token, [head_dim / 2] fp32."""
    pairs = torch.arange(0, model.head_dim, 2, dtype=torch.float32)
    angle = 1.0 / model.rope_base ** (pairs / model.head_dim)
    match model.rope_scaling:
        case "linear":
            return angle / model.rope_factor
        case "llama3":
            turns = model.rope_original_tokens * angle / (2 * math.pi)
            kept = ((turns - LLAMA3_SLOW) / (LLAMA3_FAST - LLAMA3_SLOW)).clamp(0, 1)
            return angle * kept + angle / model.rope_factor * (1 - kept)
        case "yarn":
            kept = 1 - _ramp(pairs / 2, _pair_of(YARN_FAST, model), _pair_of(YARN_SLOW, model), model)
            return angle * kept + angle / model.rope_factor * (1 - kept)
        case _:
            return angle


def score_factor(model: ModelConfig) -> float:
    """The factor by which the scaling multiplies attention scores."""
    if model.position == "rope" and model.rope_scaling == "yarn":
        return (0.1 * math.log(model.rope_factor) + 1) ** 2
    return 1.0


def _pair_of(turns: float, model: ModelConfig) -> float:
    """The (fractional) index of the pair that makes this many full rotations within the original row."""
    wanted = model.rope_original_tokens / (turns * 2 * math.pi)
    return model.head_dim * math.log(wanted) / (2 * math.log(model.rope_base))


def _ramp(pair: torch.Tensor, fast: float, slow: float, model: ModelConfig) -> torch.Tensor:
    """0 up to pair `fast`, 1 from pair `slow` on, linear between."""
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), model.head_dim - 1)
    return ((pair - low) / max(high - low, 0.001)).clamp(0, 1)


class Rotary:
    """Rotates queries and keys by their positions. Has no parameters; its table grows with the longest row seen."""

    def __init__(self, model: ModelConfig) -> None:
        self.angles = angles_per_token(model)
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x_SBHD: torch.Tensor, positions_S: torch.Tensor | None, *, length: int) -> torch.Tensor:
        """x_SBHD rotated, in its dtype. positions_S: position of each token, all below `length`; None: a whole row in order."""
        cos, sin = self.angles_up_to(length, x_SBHD.device)
        if positions_S is None:
            cos_S, sin_S = cos[:length], sin[:length]
        else:
            cos_S, sin_S = cos[positions_S], sin[positions_S]
        return _Rotate.apply(x_SBHD, cos_S[:, None, None], sin_S[:, None, None])

    def angles_up_to(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, sines) [at least `length` positions, pairs], fp32."""
        if self.table is None or self.table[0].shape[0] < length or self.table[0].device != device:
            positions = torch.arange(max(length, 256), dtype=torch.float32, device=device)
            angles = torch.outer(positions, self.angles.to(device))
            self.table = (angles.cos(), angles.sin())
        return self.table


class _Rotate(torch.autograd.Function):
    """Rotation of pairs (i, i + D/2); the backward pass is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(work).chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=work, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin)
    return out.to(x.dtype)
