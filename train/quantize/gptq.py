"""GPTQ (arXiv 2210.17323): chooses codes that preserve a layer's output on calibration inputs rather than its weights.

    H = sum of x x' over the inputs x of a layer.  Columns are rounded one after the other; each column's error is distributed
    over the columns that are not rounded yet, with weights from H^-1 (section 3, equation 2).

The scale of a group is chosen when its first column is reached, from the weights at that moment. Integer scales are searched:
from 0.5 to 1 times amax, the one with the least squared error, columns weighted by the diagonal of H. FP8 blocks use the scale
of their amax, because FP8's step size is proportional to the number.
"""

import torch

from recipes.schema.errors import NumericsError
from recipes.schema.weight_formats import WeightFormat
from train.quantize.rounding import QuantizedMatrix, half_range, nearest_codes, scales_of, spread, usable

DAMPING = 0.01
"""Added to the diagonal of H, as a fraction of its mean (section 3, step 3 of the paper)."""
_COLUMNS = 128
"""Columns of a block. Errors are distributed within a block at each column, and over the rest of the matrix once per block."""
_SHRINKS = torch.linspace(1.0, 0.5, 21).tolist()


def inverse_factor(hessian: torch.Tensor, *, name: str) -> torch.Tensor:
    """The upper Cholesky factor of H^-1, float64. NumericsError if the calibration inputs were not finite.

    Inputs that are always zero get a diagonal of one: their weights round to the nearest code.
    """
    if not bool(hessian.isfinite().all()):
        raise NumericsError(f"{name}: inputs of the calibration rows are NaN or infinite. Use an earlier checkpoint.")
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    form: WeightFormat,
    *,
    factor: torch.Tensor,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedMatrix:
    """Quantise a matrix [outputs, inputs], given the Hessian [inputs, inputs] of its inputs. factor: `inverse_factor` of it."""
    weight = weight.double().clone()
    importance = hessian.diagonal().float()
    group = form.block[1] if form.block[0] == 1 else None
    scale = _searched(weight.float(), importance, form, scale_dtype) if form.block == (1, None) else None
    if form.codes == "e4m3":
        scale = scales_of(weight, form, scale_dtype=scale_dtype)
    wide = None if scale is None else spread(scale.float(), form, weight.shape).expand(weight.shape).double()
    scales, codes = [], []
    for start in range(0, weight.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, weight.shape[1])
        part, errors, own = weight[:, start:end], torch.zeros_like(weight[:, start:end]), factor[start:end, start:end]
        for index in range(end - start):
            column = start + index
            if group is not None and column % group == 0:
                assert _COLUMNS % group == 0, f"groups of {group} cross blocks of {_COLUMNS} columns"
                now = part[:, index : index + group].float()
                scales.append(_searched(now, importance[column : column + group], form, scale_dtype))
            current = scales[-1][:, 0].double() if wide is None else wide[:, column]
            code = nearest_codes((part[:, index] / current).float(), form)
            codes.append(code)
            errors[:, index] = (part[:, index] - code.double() * current) / own[index, index]
            part[:, index + 1 :] -= errors[:, index, None] * own[index, index + 1 :]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return QuantizedMatrix(form, torch.stack(codes, dim=1), torch.cat(scales, dim=1) if scale is None else scale)


def _searched(block: torch.Tensor, importance: torch.Tensor, form: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    """The scale [outputs, 1] of rows with the least squared error, columns weighted by their importance."""
    amax = block.abs().amax(dim=1, keepdim=True)
    best = usable(amax / half_range(form), dtype)
    least = torch.full_like(amax, torch.inf)
    for shrink in _SHRINKS:
        scale = usable(amax * shrink / half_range(form), dtype)
        rounded = nearest_codes(block / scale.float(), form).float() * scale.float()
        error = ((rounded - block).square() * importance).sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
