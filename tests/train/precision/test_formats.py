"""Rounding to small formats against ml_dtypes and torch: every code, every midpoint, and everything beyond the ends."""

import ml_dtypes
import numpy as np
import pytest
import torch

from recipes.schema.scaling import E2M1, E4M3, E5M2, Format, Operand
from train.precision.quantize import quantize, round_to

FORMATS = {
    "e4m3": (E4M3, ml_dtypes.float8_e4m3fn, 8),
    "e5m2": (E5M2, ml_dtypes.float8_e5m2, 8),
    "e2m1": (E2M1, ml_dtypes.float4_e2m1fn, 4),
}


def both_ways(y: torch.Tensor, format: Format) -> torch.Tensor:
    """round_to, after checking that the compiled form gives the same bits."""
    expected = round_to(y, format)
    unit = quantize(y[None], Operand(format, "unit"), "rows").values[0]
    assert torch.equal(unit.view(torch.int32), expected.view(torch.int32))
    return expected


def codes(name: str) -> torch.Tensor:
    """All finite numbers of a format, ascending."""
    _, dtype, bits = FORMATS[name]
    values = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)
    return torch.from_numpy(np.unique(values[np.isfinite(values)])).float()


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_itself(name: str) -> None:
    format = FORMATS[name][0]
    values = codes(name)
    assert float(values.max()) == format.max
    assert torch.equal(both_ways(values, format), values)


@pytest.mark.parametrize("name", FORMATS)
def test_every_midpoint_goes_to_even_and_its_neighbours_to_the_nearest(name: str) -> None:
    format, dtype, _ = FORMATS[name]
    values = codes(name).double()
    middle = ((values[1:] + values[:-1]) / 2).float()
    assert torch.equal(middle.double(), (values[1:] + values[:-1]) / 2), "midpoints are exact in fp32"
    infinity = torch.tensor(float("inf"))
    probes = torch.cat([middle, middle.nextafter(infinity), middle.nextafter(-infinity)])
    want = probes.numpy().astype(dtype).astype(np.float32)
    assert torch.equal(both_ways(probes, format), torch.from_numpy(want))


@pytest.mark.parametrize("name", FORMATS)
def test_beyond_the_largest_number_saturates_and_nan_stays(name: str) -> None:
    format = FORMATS[name][0]
    top = torch.tensor(format.max)
    beyond = torch.stack([top, top * 1.03, top * 1.0625, top * 2, torch.tensor(3.4e38), torch.tensor(float("inf"))])
    assert torch.equal(both_ways(beyond, format), top.expand(6))
    assert torch.equal(both_ways(-beyond, format), -top.expand(6))
    nan = torch.tensor([float("nan"), -float("nan")])
    assert bool(both_ways(nan, format).isnan().all())


@pytest.mark.parametrize("name", FORMATS)
def test_signed_zeros_and_the_smallest_numbers(name: str) -> None:
    format = FORMATS[name][0]
    smallest = 2.0 ** (format.min_exponent - format.mantissa)
    probes = torch.tensor([0.0, -0.0, smallest / 2, -smallest / 2, smallest * 0.51, 1e-45, -1e-45, smallest * 1.5])
    want = torch.tensor([0.0, -0.0, 0.0, -0.0, smallest, 0.0, -0.0, smallest * 2])
    assert torch.equal(both_ways(probes, format).view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_bf16_number_casts_as_in_torch(name: str) -> None:
    format = FORMATS[name][0]
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    finite = everything[torch.isfinite(everything)].float()
    want = finite.clamp(-format.max, format.max).to(dtype).float()  # torch's own E5M2 cast overflows to infinity
    assert torch.equal(both_ways(finite, format).view(torch.int32), want.view(torch.int32))


def test_two_million_random_numbers_cast_as_in_ml_dtypes() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(2_000_000, generator=g) * torch.exp(4 * torch.randn(2_000_000, generator=g))
    for format, dtype, _ in FORMATS.values():
        inside = y.clamp(-format.max, format.max)
        want = inside.numpy().astype(dtype).astype(np.float32)
        assert torch.equal(both_ways(y, format), torch.from_numpy(want)), format.name
