"""GPTQ gives the codes of the paper's plain procedure, and a smaller output error than rounding to nearest."""

import pytest
import torch

from recipes.schema.errors import NumericsError
from recipes.schema.weight_formats import FORMATS
from train.quantize.gptq import DAMPING, gptq, inverse_factor
from train.quantize.rounding import quantize


def inputs(seed: int, columns: int) -> torch.Tensor:
    """Correlated inputs of very different sizes, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=generator)
    noise = torch.randn(512, columns, generator=generator)
    return torch.randn(512, columns // 4, generator=generator) @ mix + noise * torch.rand(columns, generator=generator)


def weights(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_the_paper(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Section 3.1 of arXiv 2210.17323 (optimal brain quantisation, columns in order): after a column, its row and column are
    eliminated from H^-1 (equation 3)."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        codes[:, column] = (weight[:, column] / scale[:, 0].double()).round().clamp(-128, 127)
        error = (weight[:, column] - codes[:, column] * scale[:, 0].double()) / inverse[column, column]
        weight[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
        inverse -= inverse[:, column, None] @ inverse[None, column] / inverse[column, column]
    return codes.to(torch.int8)


def test_codes_are_those_of_the_plain_procedure() -> None:
    columns = 160  # more than one block of columns
    weight, x = weights(1, 24, columns), inputs(2, columns)
    hessian = x.t() @ x
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(columns)
    found = gptq(weight, hessian, FORMATS["int8"], factor=inverse_factor(hessian, name="w"))
    assert torch.equal(found.codes, by_the_paper(weight, damped, found.scale))


@pytest.mark.parametrize(("name", "most"), [("int8", 0.9), ("int4-g32", 0.7), ("int4-g128", 0.6), ("fp8-block", 0.9)])
def test_output_error_is_smaller_than_rounding_to_nearest(name: str, most: float) -> None:
    form, columns = FORMATS[name], 256
    weight, x, fresh = weights(3, 96, columns), inputs(4, columns), inputs(4, columns)[:256]
    hessian = x.t() @ x
    found = gptq(weight, hessian, form, factor=inverse_factor(hessian, name="w"))

    def error(dense: torch.Tensor) -> float:
        return float((fresh @ (dense - weight).t()).norm())

    assert error(found.dense()) < most * error(quantize(weight, form, name="w").dense())
    assert found.scale.shape == form.scale_shape((96, columns)) and found.codes.shape == weight.shape


def test_inputs_that_are_always_zero_leave_their_weights_at_the_nearest_code() -> None:
    weight, x = weights(5, 8, 64), inputs(6, 64)
    x[:, 10:20] = 0
    hessian = x.t() @ x
    found = gptq(weight, hessian, FORMATS["fp8-block"], factor=inverse_factor(hessian, name="w"))
    nearest = quantize(weight, FORMATS["fp8-block"], name="w")
    assert torch.equal(found.dense()[:, 10:20], nearest.dense()[:, 10:20])


def test_calibration_inputs_that_are_not_finite_are_refused() -> None:
    hessian = torch.eye(8)
    hessian[1, 1] = torch.nan
    with pytest.raises(NumericsError, match=r"layer 4 mixer\.in_proj.*NaN or infinite"):
        inverse_factor(hessian, name="layer 4 mixer.in_proj")
