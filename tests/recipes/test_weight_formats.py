"""Formats of quantised weights without torch: names, the matrices they apply to, bytes."""

from dataclasses import replace

import pytest

from launch.plan.cost.inference import inference_memory
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds, parameters
from recipes.schema.scaling import linear_shapes
from recipes.schema.weight_formats import FORMATS, stored_linears, weight_format

HYBRID = ModelConfig(
    pattern="M-M*-w-",
    vocab=512,
    hidden=256,
    ffn=512,
    heads=8,
    kv_heads=2,
    head_dim=32,
    mamba_heads=16,
    mamba_head_dim=32,
)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("int4", "int4-g32"), ("int4-g23", "int4-g32"), ("fp8", "fp8-block"), ("INT8", "Use one of int8")],
)
def test_unknown_format_suggests_the_closest(typed: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"'{typed}' is not a format of quantised weights.*{meant}"):
        weight_format(typed)


@pytest.mark.parametrize("activation", ["relu2", "geglu"])
def test_stored_matrices_hold_every_weight_of_the_linear_layers(activation: str) -> None:
    model = replace(HYBRID, activation=activation)  # type: ignore[arg-type]
    fused = sum(
        rows * columns for kind in layer_kinds(model.pattern) for rows, columns in linear_shapes(model, kind).values()
    )
    assert sum(rows * columns for _, _, (rows, columns) in stored_linears(model)) == fused


def test_bytes_per_weight_of_large_matrices() -> None:
    """Codes and scales by hand: 8 bits and 4 bytes a row; 4 bits and 2 bytes for a group; 8 bits and 4 bytes a block."""
    shape = (4096, 4096)
    weights = 4096 * 4096
    assert FORMATS["int8"].stored_bytes(shape, scale_bytes=4) == weights + 4 * 4096 + 16
    assert FORMATS["int4-g32"].stored_bytes(shape, scale_bytes=2) == weights // 2 + 2 * weights // 32 + 16
    assert FORMATS["int4-g128"].stored_bytes(shape, scale_bytes=2) == weights // 2 + 2 * weights // 128 + 16
    assert FORMATS["fp8-block"].stored_bytes(shape, scale_bytes=4) == weights + 4 * 32 * 32


@pytest.mark.parametrize("name", list(FORMATS))
def test_planned_memory_is_the_dense_rest_and_the_stored_matrices(name: str) -> None:
    shapes = [shape for _, _, shape in stored_linears(HYBRID)]
    dense = 2 * (parameters(HYBRID).total - sum(rows * columns for rows, columns in shapes))
    dense += 2 * 3 * HYBRID.mamba_heads * layer_kinds(HYBRID.pattern).count("M")  # A_log, D and dt_bias are fp32
    stored = sum(FORMATS[name].stored_bytes(shape, scale_bytes=2) for shape in shapes)
    assert inference_memory(HYBRID, context_tokens=1, quantized=name).weights == dense + stored
