"""Block quantisers: the compiled and the plain form agree to the bit, scales are exact, random rounding is unbiased."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.schema.precision import PrecisionConfig
from recipes.schema.scaling import E2M1, E4M3, E5M2, Operand, scaling_of
from train.precision import health
from train.precision.quantize import (
    encoding_scale,
    hadamard_matrix,
    quantize,
    round_stochastically,
    round_to,
    scale_from_history,
)

NAMES = ("delayed", "current", "blockwise", "mxfp8", "nvfp4", "unscaled")
ORIENTED = (
    ("input", "rows"), ("weight", "rows"), ("weight", "columns"), ("grad", "rows"),
    ("input_for_weight_grad", "columns"), ("grad_for_weight_grad", "columns"),
)  # fmt: skip


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 20).map(lambda n: 16 * n),
    columns=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1.0, 8.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    special=st.sampled_from([None, 0.0, math.inf, -math.inf, math.nan]),
    seed=st.integers(0, 2**31),
)
def test_compiled_and_plain_give_the_same_bits(
    name: str, rows: int, columns: int, spread: float, dtype: torch.dtype, special: float | None, seed: int
) -> None:
    scaling = scaling_of(PrecisionConfig(), name)
    assert scaling is not None
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp(spread * torch.randn(rows, columns, generator=g))
    if special is not None:
        x[:: max(1, rows // 3), :: max(1, columns // 3)] = special
    x = x.to(dtype)
    for operand, along in ORIENTED:
        fast = quantize(x, getattr(scaling, operand), along, scale=3.7, seed=seed)  # type: ignore[arg-type]
        plain = quantize(x, getattr(scaling, operand), along, scale=3.7, seed=seed, torch_only=True)  # type: ignore[arg-type]
        assert torch.equal(fast.values.isnan(), plain.values.isnan()), operand
        assert torch.equal(fast.values.nan_to_num(), plain.values.nan_to_num()), operand
        assert (fast.factor, fast.amax) == (plain.factor, plain.amax), operand


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
@pytest.mark.parametrize("shape", [(256, 384), (130, 200)], ids=["whole", "ragged"])
def test_block_scales_in_exact_arithmetic(block: tuple[int, int], shape: tuple[int, int]) -> None:
    """Python's fractions of each block: the largest power of two that keeps amax within 448."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=g) * torch.exp(3 * torch.randn(*shape, generator=g))
    decoded = quantize(x, Operand(E4M3, "power_of_two", block), "rows").decoded()
    height, width = block
    for top in range(0, shape[0], height * (16 if height == 1 else 1)):
        for left in range(0, shape[1], width):
            exact = x[top : top + height, left : left + width].double()
            scale = 2.0 ** math.floor(math.log2(448.0 / float(exact.abs().max())))
            want = round_to((exact * scale).float(), E4M3).double() / scale
            assert torch.equal(decoded[top : top + height, left : left + width].double(), want)


def test_mxfp8_scales_round_up_and_nothing_saturates() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=g) * torch.exp(5 * torch.randn(64, 256, generator=g))
    decoded = quantize(x, Operand(E4M3, "e8m0", (1, 32)), "rows").decoded().double()
    for row in range(64):
        for left in range(0, 256, 32):
            exact = x[row, left : left + 32].double()
            scale = 2.0 ** -math.ceil(math.log2(float(exact.abs().max()) / 448.0))
            assert float((exact * scale).abs().max()) <= 448.0
            want = round_to((exact * scale).float(), E4M3).double() / scale
            assert torch.equal(decoded[row, left : left + 32], want)


def test_the_smallest_numbers_of_all_still_get_a_scale() -> None:
    x = torch.full((1, 32), 2.0**-133)
    for rule in ("power_of_two", "e8m0"):
        values = quantize(x, Operand(E4M3, rule, (1, 32)), "rows").decoded()  # type: ignore[arg-type]
        assert torch.equal(values, x), rule


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_where_it_is_and_does_not_spread(name: str) -> None:
    """A NaN must reach the loss; the rest of its block keeps its scale."""
    scaling = scaling_of(PrecisionConfig(), name)
    assert scaling is not None
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    clean = quantize(x, scaling.input, "rows").decoded()
    at = x.abs().argmin()
    x.view(-1)[at] = math.nan
    dirty = quantize(x, scaling.input, "rows").decoded()
    assert bool(dirty.view(-1)[at].isnan()) and int(dirty.isnan().sum()) == 1
    dirty.view(-1)[at] = clean.view(-1)[at]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize("format", [E2M1, E4M3, E5M2], ids=lambda f: f.name)
def test_random_rounding_takes_a_neighbour_and_is_right_on_average(format: object) -> None:
    targets = torch.tensor([0.3, 0.6, 1.1, 1.9, 2.2, 3.3, 4.7, 5.9, 0.05, -2.7])
    n = 200_000
    for target in targets:
        y = target.repeat(n)
        rounded = round_stochastically(y, format, seed=7).double()  # type: ignore[arg-type]
        values = rounded.unique()
        assert len(values) <= 2 and float(values.min()) <= float(target) <= float(values.max())
        width = float(values.max() - values.min())
        assert abs(float(rounded.mean()) - float(target)) < 4 * width / 2 / math.sqrt(n) + 1e-7  # four sigma
    exact = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -6.0])
    assert torch.equal(round_stochastically(exact, format, seed=3), exact)  # type: ignore[arg-type]


def test_random_rounding_differs_by_seed_and_repeats() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    operand = Operand(E2M1, "nvfp4", (1, 16), stochastic=True)
    a, b, again = (quantize(x, operand, "rows", seed=seed).values for seed in (1, 2, 1))
    assert torch.equal(a, again) and not torch.equal(a, b)


def test_the_hadamard_rotation_is_orthogonal_and_cancels_in_a_product() -> None:
    matrix = hadamard_matrix().double()
    assert torch.equal(matrix @ matrix.t(), torch.eye(16, dtype=torch.float64))
    assert set(np.unique(matrix.numpy())) == {-0.25, 0.25}
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize(torch.zeros(17, 16), Operand(E2M1, "nvfp4", (1, 16), hadamard=True), "columns")


def test_delayed_scales_are_the_correctly_rounded_quotient() -> None:
    g = torch.Generator().manual_seed(0)
    amax = torch.rand(500, generator=g) * torch.exp(10 * torch.randn(500, generator=g))
    scale, history = torch.ones(500), torch.zeros(3, 500)
    history[0] = amax
    scale_from_history(history, scale, torch.full((500,), 448.0), most_recent=False)
    assert torch.equal(scale, (448.0 / amax.double()).float())
    assert torch.equal(history[2], amax) and float(history[:2].abs().max()) == 0.0
    for _ in range(2):
        scale_from_history(history, scale, torch.full((500,), 448.0), most_recent=False)
    assert torch.equal(scale, (448.0 / amax.double()).float()), "the window still holds the amax"
    scale_from_history(history, scale, torch.full((500,), 448.0), most_recent=False)
    assert torch.equal(scale, (448.0 / amax.double()).float()), "an empty window leaves the scale"


def test_without_a_compiler_the_same_numbers_come_out(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from train.native import quantize as native

    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    operand = Operand(E4M3, "power_of_two", (1, 128))
    want = quantize(x, operand, "rows").values
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert torch.equal(quantize(x, operand, "rows").values, want)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    columns=st.integers(1, 300),
    spread=st.sampled_from([0.0, 3.0, 12.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    special=st.sampled_from([None, 0.0, math.inf, math.nan]),
    seed=st.integers(0, 2**31),
)
def test_measurements_are_those_of_the_definition(
    name: str, columns: int, spread: float, dtype: torch.dtype, special: float | None, seed: int
) -> None:
    """Compiled against plain torch, and both against what every element was scaled with."""
    scaling = scaling_of(PrecisionConfig(), name)
    assert scaling is not None
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(96, columns, generator=g) * torch.exp(spread * torch.randn(96, columns, generator=g))
    if special is not None:
        x[::7, :: max(1, columns // 2)] = special
    x = x.to(dtype)
    for operand, along in ((scaling.input, "rows"), (scaling.weight, "columns"), (scaling.grad, "rows")):
        operand = dataclasses.replace(operand, stochastic=False)
        result = quantize(x, operand, along, scale=5.0)  # type: ignore[arg-type]
        fast = health.measure(x, result, operand, along, scale=5.0)  # type: ignore[arg-type]
        plain = health.measure(x, result, operand, along, scale=5.0, torch_only=True)  # type: ignore[arg-type]
        assert fast.signal == pytest.approx(plain.signal, rel=1e-12)
        assert fast.noise == pytest.approx(plain.noise, rel=1e-12, nan_ok=True)
        assert dataclasses.replace(fast, signal=0, noise=0) == dataclasses.replace(plain, signal=0, noise=0)
        encode = encoding_scale(x.float(), operand, along, scale=5.0)  # type: ignore[arg-type]
        assert fast.saturated == int(((x.float() * encode).abs() > operand.format.overflow).sum())
        if special != math.inf:
            largest = int(x.float().abs().nan_to_num(nan=0.0).argmax())
            assert fast.scale == float(encode.expand(x.shape).reshape(-1)[largest])
