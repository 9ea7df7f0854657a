"""Packing, scales, codes and dequantised weights: the same bits as compressed-tensors, for every format and shape."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.schema.errors import CheckpointError
from recipes.schema.weight_formats import FORMATS, WeightFormat
from train.quantize.directory import to_config
from train.quantize.packing import pack, unpack
from train.quantize.rounding import QuantizedMatrix, quantize, rounded_tokens


def drawn(seed: int, rows: int, columns: int) -> torch.Tensor:
    """Weights whose rows differ in size, with a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 3
    weight[0] = 0
    return weight


def arguments(form: WeightFormat) -> QuantizationArgs:
    """The package's own description of a format, read from what we write to config.json."""
    return QuantizationArgs(**to_config(form, ignore=[])["config_groups"]["group_0"]["weights"])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((4, 8)), st.integers(1, 9), st.integers(1, 77), st.integers(0, 1 << 30))
def test_packed_codes_are_those_of_the_package_and_come_back(width: int, rows: int, columns: int, seed: int) -> None:
    low = -(1 << (width - 1))
    codes = torch.randint(low, -low, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    words = pack(codes, bits=width)
    assert torch.equal(words, pack_to_int32(codes, width))
    assert torch.equal(unpack(words, bits=width, columns=columns), codes)
    assert torch.equal(unpack_from_int32(words, width, torch.Size((rows, columns))), codes)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(FORMATS)), st.integers(2, 300), st.integers(1, 5), st.integers(0, 9), st.integers(0, 1 << 30)
)
def test_scales_codes_and_weights_are_those_of_the_package(
    name: str, rows: int, groups: int, more: int, seed: int
) -> None:
    form = FORMATS[name]
    group = form.block[1] or 1
    weight = drawn(seed, rows, groups * group + (more if form.block[0] != 1 or form.block[1] is None else 0))
    ours = quantize(weight, form, name="w")
    args = arguments(form)
    height, width = (size or whole for size, whole in zip(form.block, weight.shape, strict=True))
    amax = torch.stack(
        [torch.stack([block.abs().max() for block in band.split(width, 1)]) for band in weight.split(height, 0)]
    )
    scale, _ = calculate_qparams(-amax, amax, args)
    assert torch.equal(ours.scale, scale)
    compressor: Any = BaseCompressor.get_value_from_registry(form.container)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    stored = ours.stored()
    assert stored.keys() == theirs.keys()
    assert all(stored[key].dtype == theirs[key].dtype for key in stored)
    assert all(torch.equal(bits(stored[key]), bits(theirs[key])) for key in stored)
    assert torch.equal(ours.dense(), compressor.decompress(theirs, scheme)["weight"])
    assert torch.equal(bits(QuantizedMatrix.from_stored(form, stored).codes), bits(ours.codes))


@pytest.mark.parametrize("name", list(FORMATS))
def test_stored_tensors_have_the_shapes_and_bytes_that_the_plan_counts(name: str) -> None:
    form = FORMATS[name]
    for shape in ((96, 256), (130, 384)):
        for dtype in (torch.float32, torch.bfloat16):
            stored = quantize(drawn(1, *shape), form, name="w", scale_dtype=dtype).stored()
            assert {key: (tuple(t.shape), t.element_size()) for key, t in stored.items()} == {
                key: (size, width or dtype.itemsize) for key, (size, width) in form.stored_shapes(shape).items()
            }
            assert form.stored_bytes(shape, scale_bytes=dtype.itemsize) == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("name", ["int8-w8a8", "fp8-w8a8"])
def test_inputs_are_rounded_token_by_token_as_the_package_rounds_them(name: str) -> None:
    x = drawn(4, 12, 96).reshape(3, 4, 96)
    args = QuantizationArgs(**to_config(FORMATS[name], ignore=[])["config_groups"]["group_0"]["input_activations"])
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    assert torch.equal(rounded_tokens(x, FORMATS[name]), fake_quantize(x, scale, zero, args))
    half = x.bfloat16()
    assert torch.equal(rounded_tokens(half, FORMATS[name]), rounded_tokens(half.float(), FORMATS[name]).bfloat16())
    x[1, 2, 3] = torch.nan
    assert bool(rounded_tokens(x, FORMATS[name])[1, 2].isnan().all()), "NaN must not become a number"


def test_error_is_at_most_half_a_step_or_where_the_largest_code_ends() -> None:
    weight = drawn(3, 64, 256)
    for name in ("int8", "int4-g32", "int4-g128"):
        matrix = quantize(weight, FORMATS[name], name="w")
        scale = matrix.scale.repeat_interleave(weight.shape[1] // matrix.scale.shape[1], dim=1)
        assert bool(((matrix.dense() - weight).abs() <= 0.5 * scale + 3e-7 * weight.abs()).all())  # and fp32 rounding


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight = drawn(0, 4, 32)
    weight[2, 5] = bad
    with pytest.raises(CheckpointError, match=r"layers\.3\.up_proj.*NaN or infinite"):
        quantize(weight, FORMATS["int4-g32"], name="layers.3.up_proj")
