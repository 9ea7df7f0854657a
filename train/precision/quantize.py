"""Quantise and decode: the exact values that a low-precision GEMM multiplies, as fp32, in plain torch on any device.

    matrix --scale of each block--> code points of a small format --decode--> fp32 values    (`quantize`)

This file is the definition; `quantize.c` computes the same bits in one pass over memory and is used if possible.
Semantics follow Transformer Engine: round to nearest even, saturate to the format's largest number, amax ignores NaN, a
block of zeros (or with an infinity) gets scale 1, NaN stays NaN. docs/fp8.md lists the references of the tests.
"""

from dataclasses import dataclass

import torch

from recipes.schema.scaling import E4M3, HADAMARD, Format, Operand, Orientation
from train.native import quantize as native

FP32_MAX = torch.finfo(torch.float32).max
RULES = {"fp32": 0, "power_of_two": 1, "e8m0": 2, "nvfp4": 3, "history": 0, "unit": 0}
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Transformer Engine's fixed signs of the Hadamard rotation (NVFP4 pretraining, arXiv 2509.25149)."""


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix as input of a GEMM."""

    values: torch.Tensor
    """[rows, columns] fp32: code points, times the block's decoding scale if scales are per block."""
    factor: float
    """Decoding scale of the whole tensor. It multiplies the GEMM's result, not the values: one rounding instead of two."""
    amax: float | None = None
    """Largest magnitude, if the scaling rule needs it."""

    def decoded(self) -> torch.Tensor:
        """[rows, columns] fp32: the decoded matrix."""
        return self.values * self.factor


def quantize(
    x: torch.Tensor,
    operand: Operand,
    along: Orientation,
    *,
    scale: float = 1.0,
    seed: int = 0,
    torch_only: bool = False,
) -> Quantized:
    """Quantise a matrix [rows, columns], fp32 or bf16, with its scale blocks along the dimension that the GEMM sums over.

    scale: the encoding scale, used if the operand's rule is `history` or `unit`. seed: seed of stochastic rounding.
    torch_only: do not use the compiled version.
    """
    x = x.contiguous()
    use_native = not torch_only and native.usable(x)
    if operand.hadamard:
        if along != "columns":
            raise ValueError("the Hadamard rotation acts along tokens: only weight gradients use it")
        x = rotate(x, torch_only=not use_native)
    if operand.block is None:
        return _quantize_tensor(x, operand, scale, use_native=use_native)
    across, length = operand.block
    height, width = (across, length) if along == "rows" else (length, across)
    multiplier, decode, factor, amax = 1.0, 1.0, 1.0, None
    if operand.rule == "nvfp4":
        amax = _amax(x, use_native=use_native)
        multiplier, decode, factor = _nvfp4_tensor_scale(amax, operand.format)
    if use_native:
        spec = _spec(operand, seed)
        spec.tensor_multiplier, spec.tensor_decode = multiplier, decode
        values = native.blocks(x, spec, height=height, width=width)
    else:
        values = _blocks(x, operand, height, width, multiplier=multiplier, tensor_decode=decode, seed=seed)
    return Quantized(values, factor, amax)


def round_to(y: torch.Tensor, format: Format) -> torch.Tensor:
    """fp32 -> nearest number of a small format, ties to even, saturating; NaN stays."""
    a = torch.where(y.abs() > format.max, format.max, y.abs())
    exponent = _exponent(a, format)
    # Adding 2^(exponent + 23 - mantissa) makes the fp32 adder round away the bits that the format lacks (ties to even).
    magic = ((exponent + (23 - format.mantissa)) << 23).view(torch.float32)
    return torch.copysign((a + magic) - magic, y)


def round_stochastically(y: torch.Tensor, format: Format, seed: int) -> torch.Tensor:
    """fp32 -> one of the two neighbouring numbers of a small format, at random so that the mean is y (if not saturated).

    y: contiguous. Element i uses 24 random bits that depend on (seed, i) only.
    """
    a = torch.where(y.abs() > format.max, format.max, y.abs())
    exponent = _exponent(a, format)
    quantum = ((exponent - format.mantissa) << 23).view(torch.float32)
    steps = a * ((254 - exponent + format.mantissa) << 23).view(torch.float32)
    whole = steps.floor()
    up = (steps - whole > _uniform(y.numel(), seed, y.device).view(y.shape)).float()
    rounded = torch.where(a == a, (whole + up) * quantum, a)
    return torch.copysign(rounded, y)


def encoding_scale(x: torch.Tensor, operand: Operand, along: Orientation, *, scale: float = 1.0) -> torch.Tensor:
    """The factor of each element before rounding, fp32, [] or [rows, columns]. x: after the rotation, if the operand has one."""
    if operand.block is None:
        amax = _magnitude(x).amax() if x.numel() else torch.zeros(())
        return _tensor_scale(amax, operand.format) if operand.rule == "fp32" else torch.tensor(scale, device=x.device)
    multiplier, decode = 1.0, 1.0
    if operand.rule == "nvfp4":
        multiplier, decode, _ = _nvfp4_tensor_scale(_amax(x, use_native=False), operand.format)
    across, length = operand.block
    height, width = (across, length) if along == "rows" else (length, across)
    return _per_element(x, operand, height, width, multiplier=multiplier, tensor_decode=decode)[0]


def scale_of_the_largest(x: torch.Tensor, operand: Operand, *, scale: float = 1.0) -> float:
    """The encoding scale of the block with the largest magnitude."""
    if operand.block is None and operand.rule != "fp32":
        return scale
    amax = _amax(x, use_native=native.usable(x))
    multiplier, decode = 1.0, 1.0
    if operand.rule == "nvfp4":
        multiplier, decode, _ = _nvfp4_tensor_scale(amax, operand.format)
    return float(_block_scales(torch.tensor(amax), operand, multiplier, decode)[0])


def hadamard_matrix(device: torch.device | None = None) -> torch.Tensor:
    """[16, 16] fp32: signs x Sylvester's Hadamard matrix / 4, orthogonal."""
    h = torch.ones(1, 1)
    while h.shape[0] < HADAMARD:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (torch.tensor(SIGNS, dtype=torch.float32)[:, None] * h / HADAMARD**0.5).contiguous().to(device)


def scale_from_history(history: torch.Tensor, scale: torch.Tensor, maxima: torch.Tensor, *, most_recent: bool) -> None:
    """Delayed scaling's update after a step, in place: new scales from the amax history, history moved on.

    history: [length, tensors], row 0 the step just finished; scale, maxima (largest number of each tensor's format):
    [tensors]. The window is read before it moves; an amax of zero, infinity or NaN leaves a scale as it was.
    """
    amax = history[0].clone() if most_recent else history.amax(0)
    new = torch.div(maxima, amax)
    new = torch.where((amax > 0) & torch.isfinite(amax), new, scale)
    scale.copy_(torch.where(torch.isinf(new), FP32_MAX, new))
    if history.shape[0] > 1:
        history.copy_(history.roll(-1, 0))
    history[0].zero_()


def _quantize_tensor(x: torch.Tensor, operand: Operand, scale: float, *, use_native: bool) -> Quantized:
    if operand.rule == "fp32":
        amax = _amax(x, use_native=use_native)
        scale = float(_tensor_scale(torch.tensor(amax), operand.format))
    if use_native:
        values, amax = native.tensor(x, _spec(operand, 0), encode=scale)
    else:
        values, amax = round_to(x.float() * scale, operand.format), _amax(x, use_native=False)
    return Quantized(values, float(torch.tensor(scale).reciprocal()), amax)


def _blocks(
    x: torch.Tensor, operand: Operand, height: int, width: int, *, multiplier: float, tensor_decode: float, seed: int
) -> torch.Tensor:
    encode, decode = _per_element(x, operand, height, width, multiplier=multiplier, tensor_decode=tensor_decode)
    scaled = x.float() * encode
    rounded = (
        round_stochastically(scaled, operand.format, seed) if operand.stochastic else round_to(scaled, operand.format)
    )
    return rounded * decode


def _per_element(
    x: torch.Tensor, operand: Operand, height: int, width: int, *, multiplier: float, tensor_decode: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoding and decoding scale of every element: [rows, columns] each."""
    rows, columns = x.shape
    pad_rows, pad_columns = -rows % height, -columns % width
    padded = torch.nn.functional.pad(x.float(), (0, pad_columns, 0, pad_rows)) if pad_rows or pad_columns else x.float()
    shape = (padded.shape[0] // height, height, padded.shape[1] // width, width)
    amax = _magnitude(padded.reshape(shape)).amax((1, 3), keepdim=True)
    pair = _block_scales(amax, operand, multiplier, tensor_decode)
    encode, decode = (scale.expand(shape).reshape(padded.shape)[:rows, :columns].contiguous() for scale in pair)
    return encode, decode


def _block_scales(
    amax: torch.Tensor, operand: Operand, multiplier: float, tensor_decode: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoding and decoding scale of each block."""
    match operand.rule:
        case "nvfp4":
            stored = round_to((amax * multiplier).clamp(max=FP32_MAX), E4M3)
            return (stored * tensor_decode).reciprocal().clamp(max=FP32_MAX), stored
        case "e8m0":
            bits = (amax * (1.0 / torch.tensor(operand.format.max))).view(torch.int32)
            exponent, mantissa = bits >> 23, bits & 0x7FFFFF
            up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= 0x400000))
            exponent = torch.where(exponent >= 254, 254, exponent + up.int())
            return _power_of_two(254 - exponent), _power_of_two(exponent)
        case "power_of_two":
            scale = (_tensor_scale(amax, operand.format).view(torch.int32) & 0x7F800000).view(torch.float32)
            return scale, scale.reciprocal()
        case _:
            scale = _tensor_scale(amax, operand.format)
            return scale, scale.reciprocal()


def _tensor_scale(amax: torch.Tensor, format: Format) -> torch.Tensor:
    """format.max / amax in fp32; 1 if amax is zero or infinite."""
    scale = torch.div(torch.tensor(format.max, device=amax.device), amax).clamp(max=FP32_MAX)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, 1.0)


def _nvfp4_tensor_scale(amax: float, format: Format) -> tuple[float, float, float]:
    """-> multiplier of a block's amax, decode, factor of the product; each rounded to fp32 as on the GPU."""
    tensor = torch.tensor(amax)
    top = torch.tensor(E4M3.max * format.max)
    encode = torch.div(top, tensor).clamp(max=FP32_MAX)
    encode = torch.where(encode == 0, 1.0, encode)
    multiplier = encode * torch.tensor(format.max).reciprocal()
    return float(multiplier), float(encode.reciprocal()), float(torch.div(tensor, top))


def _power_of_two(biased: torch.Tensor) -> torch.Tensor:
    """2 ** (biased - 127), subnormal where biased is 0."""
    return torch.where(biased == 0, 0x00400000, biased << 23).int().view(torch.float32)


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    """|x| in fp32 with NaN as zero."""
    return x.float().abs().nan_to_num_(nan=0.0, posinf=torch.inf)


def _amax(x: torch.Tensor, *, use_native: bool) -> float:
    """Largest magnitude of a matrix, NaN ignored; 0 if it is empty."""
    if use_native:
        return native.amax(x)
    return float(_magnitude(x).amax()) if x.numel() else 0.0


def _exponent(a: torch.Tensor, format: Format) -> torch.Tensor:
    """Biased exponent of the binade whose spacing applies to a >= 0, as int32."""
    return (a.view(torch.int32) >> 23).clamp_(format.min_exponent + 127, 232)


def _uniform(count: int, seed: int, device: torch.device) -> torch.Tensor:
    """`count` numbers of 24 random bits in [0, 1), the i-th a hash of (seed, i)."""
    mask = 0xFFFFFFFF
    h = (torch.arange(count, device=device) * 0x9E3779B9 ^ seed) & mask
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & mask
    h = ((h ^ (h >> 15)) * 0x735A2D97) & mask
    return ((h ^ (h >> 15)) >> 8).float() * 2.0**-24


def rotate(x: torch.Tensor, *, torch_only: bool = False) -> torch.Tensor:
    """Signed Hadamard rotation of every 16 rows, summed in order; in x's precision like the reference, stored as fp32."""
    rows, columns = x.shape
    if rows % HADAMARD:
        raise ValueError(f"{rows} tokens: the Hadamard rotation of NVFP4's weight gradient needs a multiple of 16")
    matrix = hadamard_matrix(x.device)
    if not torch_only and native.usable(x):
        return native.rotate(x, matrix)
    groups = x.float().view(rows // HADAMARD, HADAMARD, columns)
    total = matrix[0, None, :, None] * groups[:, 0, None]
    for k in range(1, HADAMARD):
        total = total + matrix[k, None, :, None] * groups[:, k, None]
    return total.to(x.dtype).float().view(rows, columns)


def _spec(operand: Operand, seed: int) -> native.Spec:
    return native.Spec(
        mantissa=operand.format.mantissa,
        min_exponent=operand.format.min_exponent,
        max=operand.format.max,
        rule=RULES[operand.rule],
        stochastic=int(operand.stochastic),
        seed=seed,
    )
