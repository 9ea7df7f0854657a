"""How much a quantised operand lost: sums that add up over ranks, and the readings made of them.

Plain torch, several passes over memory: used on the steps a recipe logs, not on every step.
"""

import math
from dataclasses import dataclass

import torch

from train.precision.control import Reading
from train.precision.quantize import Quantized, encoding_scale
from train.precision.scaling import Operand, Orientation


@dataclass(frozen=True)
class Sums:
    """One operand on one rank."""

    elements: int
    saturated: int
    underflowed: int
    signal: float
    noise: float
    amax: float
    scale: float


def measure(x: torch.Tensor, quantized: Quantized, operand: Operand, along: Orientation, *, scale: float) -> Sums:
    """Compare a matrix (as it entered quantisation: after the Hadamard rotation, where there is one) with its decoding."""
    exact = x.float()
    decoded = quantized.decoded()
    encode = encoding_scale(exact, operand, along, scale=scale)
    kept = torch.isfinite(exact)
    return Sums(
        elements=exact.numel(),
        saturated=int(((exact * encode).abs() > operand.format.overflow).sum()),
        underflowed=int(((decoded == 0) & (exact != 0)).sum()),
        signal=float(exact[kept].double().square().sum()),
        noise=float((decoded - exact)[kept].double().square().sum()),
        amax=float(exact[kept].abs().max()) if bool(kept.any()) else math.inf,
        scale=float(encode.min()),
    )


def merged(parts: list[Sums]) -> Sums:
    """The same operand over several ranks."""
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
    lossless = sums.signal == 0.0 or sums.noise == 0.0
    return Reading(
        layer=layer,
        linear=linear,
        operand=name,
        format=operand.format.name,
        amax=sums.amax,
        scale=sums.scale,
        saturated=sums.saturated / max(1, sums.elements),
        underflowed=sums.underflowed / max(1, sums.elements),
        snr_db=None if lossless else 10 * math.log10(sums.signal / sums.noise),
        floor_db=operand.format.snr_floor_db if floor_db is None else floor_db,
    )
