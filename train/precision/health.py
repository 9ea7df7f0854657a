"""Quantisation errors: sums per operand that add up over ranks, and the readings computed from them.

Measured only on the steps that a recipe logs.
"""

import math
from dataclasses import dataclass

import torch

from recipes.schema.scaling import Operand, Orientation
from train.native import quantize as native
from train.precision.control import Reading
from train.precision.quantize import Quantized, encoding_scale, scale_of_the_largest


@dataclass(frozen=True)
class Sums:
    """Error sums of one operand on one rank (or, merged, on several)."""

    elements: int
    saturated: int
    underflowed: int
    signal: float
    noise: float
    amax: float
    scale: float


def measure(
    x: torch.Tensor,
    quantized: Quantized,
    operand: Operand,
    along: Orientation,
    *,
    scale: float,
    torch_only: bool = False,
) -> Sums:
    """Compare a matrix (after the Hadamard rotation, if the operand has one) with its decoding.

    scale: the encoding scale, used if the operand's rule is `history` or `unit`. torch_only: do not use the compiled version.
    """
    largest_scale = scale_of_the_largest(x, operand, scale=scale)
    # Scales from a block's own amax never saturate, except if NVFP4 rounds the scale or x has an infinity (both below).
    limit = operand.format.overflow / largest_scale if operand.block is None else math.inf
    if not torch_only and native.usable(x):
        signal, noise, zero, over = native.compare(x, quantized.values, factor=quantized.factor, limit=limit)
        amax = native.amax(x)
    else:
        exact, decoded = x.float(), quantized.decoded()
        kept = torch.isfinite(exact)
        signal = float(exact[kept].double().square().sum())
        noise = float((decoded - exact)[kept].double().square().sum())
        zero = int(((decoded == 0) & (exact != 0)).sum())
        over = int((exact.abs() > limit).sum())
        amax = float(exact.abs().nan_to_num(nan=0.0, posinf=math.inf).max()) if x.numel() else 0.0
    if operand.rule == "nvfp4" or math.isinf(amax):
        encode = encoding_scale(x.float(), operand, along, scale=scale)
        over = int(((x.float() * encode).abs() > operand.format.overflow).sum())
    return Sums(
        elements=x.numel(), saturated=over, underflowed=zero, signal=signal, noise=noise, amax=amax, scale=largest_scale
    )


def merged(parts: list[Sums]) -> Sums:
    """Sums of the same operand, combined over ranks."""
    return Sums(
        elements=sum(p.elements for p in parts),
        saturated=sum(p.saturated for p in parts),
        underflowed=sum(p.underflowed for p in parts),
        signal=math.fsum(p.signal for p in parts),
        noise=math.fsum(p.noise for p in parts),
        amax=max(p.amax for p in parts),
        scale=min(p.scale for p in parts),
    )


def reading(sums: Sums, *, layer: int, linear: str, name: str, operand: Operand, floor_db: float | None) -> Reading:
    """Fractions and decibels of merged sums."""
    if sums.signal == 0.0 or sums.noise == 0.0:
        snr_db = None
    elif math.isfinite(sums.noise):
        snr_db = 10 * math.log10(sums.signal / sums.noise)
    else:
        snr_db = -math.inf  # an infinite amax made the scale of the tensor useless
    return Reading(
        layer=layer,
        linear=linear,
        operand=name,
        format=operand.format.name,
        amax=sums.amax,
        scale=sums.scale,
        saturated=sums.saturated / max(1, sums.elements),
        underflowed=sums.underflowed / max(1, sums.elements),
        snr_db=snr_db,
        floor_db=operand.format.snr_floor_db if floor_db is None else floor_db,
    )
