"""Quantised matrices: rounding to the nearest code, and back.

    weight --scales_of--> scale        weight, scale --round_to--> codes        codes * scale = the weight that a model uses

The arithmetic is that of compressed-tensors: scale = amax / (half the range of the codes); codes by division, rounding half to
even, and saturation; the product in the format that the model computes in. Tests compare each step with that package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from recipes.schema.errors import CheckpointError
from recipes.schema.weight_formats import WeightFormat
from train.quantize.packing import pack, unpack

CODES = {"int": torch.int8, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes [outputs, inputs] (int8 or FP8) and scales (`WeightFormat.scale_shape`) of a linear layer's weight."""

    form: WeightFormat
    codes: torch.Tensor
    scale: torch.Tensor

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """codes * scale, computed in `dtype` (None: in the format of the scales)."""
        scale = self.scale.to(dtype or self.scale.dtype)
        return self.codes.to(scale.dtype) * spread(scale, self.form, self.codes.shape)

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of compressed-tensors, by the last part of their names."""
        if self.form.container != "pack-quantized":
            return {"weight": self.codes, "weight_scale": self.scale}
        return {
            "weight_packed": pack(self.codes, bits=self.form.bits),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }

    @classmethod
    def from_stored(cls, form: WeightFormat, tensors: Mapping[str, torch.Tensor]) -> "QuantizedMatrix":
        """Reverse `stored`."""
        if form.container != "pack-quantized":
            return cls(form, tensors["weight"], tensors["weight_scale"])
        columns = int(tensors["weight_shape"][1])
        return cls(form, unpack(tensors["weight_packed"], bits=form.bits, columns=columns), tensors["weight_scale"])


def quantize(
    weight: torch.Tensor, form: WeightFormat, *, name: str, scale_dtype: torch.dtype = torch.float32
) -> QuantizedMatrix:
    """Round a matrix to the nearest codes. CheckpointError names a weight that is not finite."""
    if not bool(weight.isfinite().all()):
        raise CheckpointError(
            f"{name} has NaN or infinite values and cannot be quantised. Use an earlier checkpoint: stratum checkpoint list."
        )
    scale = scales_of(weight, form, scale_dtype=scale_dtype)
    return QuantizedMatrix(form, round_to(weight, scale, form), scale)


def rounded_tokens(x: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Inputs of a linear layer [..., width] rounded to a format's codes, each token with a scale of its own. NaN stays NaN."""
    tokens = x.reshape(-1, x.shape[-1])
    by_token = replace(form, block=(1, None))
    scale = scales_of(tokens, by_token)  # in fp32, as inference engines compute it
    return QuantizedMatrix(by_token, round_to(tokens, scale, by_token), scale).dense().to(x.dtype).reshape(x.shape)


def scales_of(weight: torch.Tensor, form: WeightFormat, *, scale_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The scale of each block, from its largest magnitude."""
    rows, columns = (width or size for width, size in zip(form.block, weight.shape, strict=True))
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return usable(blocks.abs().amax(dim=(1, 3)) / half_range(form), scale_dtype)


def half_range(form: WeightFormat) -> float:
    """The code that a block's largest magnitude is mapped to. Positive integers saturate at half a step less."""
    return (form.highest - form.lowest) / 2


def usable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in their stored format. The scale of a block of zeros becomes the format's epsilon, to avoid division by zero."""
    scale = scale.to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def round_to(weight: torch.Tensor, scale: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Codes of a matrix for given scales: nearest, ties to even, saturated."""
    ratio = weight.float() / spread(scale.float(), form, weight.shape)
    return nearest_codes(ratio, form)


def nearest_codes(ratio: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Codes nearest to weight / scale."""
    ratio = ratio.clamp(form.lowest, form.highest)
    return (ratio.round() if form.codes == "int" else ratio).to(CODES[form.codes])


def spread(scale: torch.Tensor, form: WeightFormat, shape: torch.Size) -> torch.Tensor:
    """Scales repeated over their blocks, in a shape that multiplies a matrix of `shape`."""
    for dim, width in enumerate(form.block):
        if width is not None and width > 1:
            scale = scale.repeat_interleave(width, dim=dim).narrow(dim, 0, shape[dim])
    return scale
