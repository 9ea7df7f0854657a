"""Formats of quantised weights: codes and scales of the linear layers, as compressed-tensors stores them (docs/quantize.md).

    weight = codes * scale        one scale for a whole row (output), for a group of a row, or for a block of rows and columns

Only linear layers are quantised: their weights, and in `w8a8` formats also their inputs, which the engine rounds as it runs, with
a scale for each token. Embedding, head, norms, convolution, A_log, D and dt_bias keep their format.
The planner uses this file on machines without torch to count the bytes of a format.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from recipes.schema.errors import Problem, RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import GATED, layer_kinds
from recipes.schema.precision import PrecisionConfig
from recipes.schema.suggestions import did_you_mean

Container = Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"]
"""How compressed-tensors stores codes: packed into 32-bit words, or unpacked as int8 or FP8."""
Codes = Literal["int", "e4m3"]
Shape = tuple[int, int]


@dataclass(frozen=True)
class WeightFormat:
    """How the weight of a linear layer [outputs, inputs] is quantised and stored."""

    name: str
    bits: Literal[4, 8]
    codes: Codes
    block: tuple[int | None, int | None]
    """(outputs, inputs) that share a scale; None: all of them."""
    container: Container
    rounds_inputs: bool = False
    """Whether an engine also rounds the inputs of these layers to the same codes, with a scale for each token."""

    @property
    def lowest(self) -> float:
        """Smallest code."""
        return -448.0 if self.codes == "e4m3" else -(2.0 ** (self.bits - 1))

    @property
    def highest(self) -> float:
        """Largest code."""
        return 448.0 if self.codes == "e4m3" else 2.0 ** (self.bits - 1) - 1

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scales of a weight. Blocks at the ends may be incomplete."""
        rows, columns = (width or size for width, size in zip(self.block, shape, strict=True))
        return math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)

    def stored_shapes(self, shape: Shape) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """{stored tensor of a weight: (shape, bytes of an element)}. Bytes are None if the format of the scales decides them."""
        scale: tuple[tuple[int, ...], int | None] = (self.scale_shape(shape), None)
        if self.container == "pack-quantized":
            packed = (shape[0], math.ceil(shape[1] * self.bits / 32))
            return {"weight_packed": (packed, 4), "weight_scale": scale, "weight_shape": ((2,), 8)}
        return {"weight": (shape, 1), "weight_scale": scale}

    def stored_bytes(self, shape: Shape, *, scale_bytes: int) -> int:
        """Bytes of a quantised weight with its scales. scale_bytes: 4 next to fp32 weights, 2 next to bf16."""
        found = self.stored_shapes(shape).values()
        return sum(math.prod(stored) * (size or scale_bytes) for stored, size in found)


FORMATS = {
    form.name: form
    for form in (
        WeightFormat("int8", 8, "int", (1, None), "pack-quantized"),
        WeightFormat("int4-g32", 4, "int", (1, 32), "pack-quantized"),
        WeightFormat("int4-g128", 4, "int", (1, 128), "pack-quantized"),
        WeightFormat("fp8-block", 8, "e4m3", (128, 128), "float-quantized"),
        WeightFormat("int8-w8a8", 8, "int", (1, None), "int-quantized", rounds_inputs=True),
        WeightFormat("fp8-w8a8", 8, "e4m3", (1, None), "float-quantized", rounds_inputs=True),
    )
}
"""The formats that `stratum hf export --quantize` writes, by name."""


def weight_format(name: str) -> WeightFormat:
    """The format of a name. RecipeError suggests the closest one."""
    if name not in FORMATS:
        begin = [form for form in FORMATS if form.startswith(name)]
        hint = did_you_mean(name, begin or FORMATS, otherwise=f"Use one of {', '.join(FORMATS)}.")
        hint = f"Did you mean {' or '.join(begin)}?" if len(begin) > 1 else hint
        raise RecipeError(f"{name!r} is not a format of quantised weights. {hint}")
    return FORMATS[name]


def stored_linears(model: ModelConfig) -> Iterator[tuple[int, str, Shape]]:
    """(layer, name, [outputs, inputs]) of every matrix of the linear layers, separated as in Hugging Face's files.

    There, queries, keys and values, and the two branches of a gated MLP, are separate matrices with their own scales.
    """
    inner = model.mamba_heads * model.mamba_head_dim
    in_proj = 2 * inner + 2 * model.mamba_groups * model.mamba_state + model.mamba_heads
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = {
        "query": (query, model.hidden),
        "key": (key, model.hidden),
        "value": (key, model.hidden),
        "output": (model.hidden, query),
    }
    gate = {"gate": (model.ffn, model.hidden)} if model.activation in GATED else {}
    matrices = {
        "M": {"in_proj": (in_proj, model.hidden), "out_proj": (model.hidden, inner)},
        "*": attention,
        "w": attention,
        "E": {},  # `expert_rules` refuses the formats for them
        "-": gate | {"up": (model.ffn, model.hidden), "down": (model.hidden, model.ffn)},
    }
    for layer, kind in enumerate(layer_kinds(model.pattern)):
        yield from ((layer, name, shape) for name, shape in matrices[kind].items())


def format_problems(form: WeightFormat, shapes: Mapping[str, tuple[int, ...]], *, key: str) -> list[Problem]:
    """Matrices whose rows are not whole groups of a format. shapes: by name. key: the field or option, for messages.

    Incomplete 128x128 blocks are allowed, because each has its own scale.
    """
    group = form.block[1]
    if form.block[0] != 1 or group is None:
        return []
    wrong = {f"{name} has {shape[1]:,}": shape[1] for name, shape in shapes.items() if shape[1] % group}
    if not wrong:
        return []
    fitting = [
        other.name
        for other in FORMATS.values()
        if other.block[0] != 1 or all(width % (other.block[1] or 1) == 0 for width in wrong.values())
    ]
    text = f"{key}={form.name}: groups of {group} do not divide the inputs of {len(wrong)} linear layers: {', '.join(wrong)}."
    return [Problem(key, text, f"Use {' or '.join(fitting)}.")]


def rounding_problems(model: ModelConfig, *, precision: PrecisionConfig, tensor: int) -> list[Problem]:
    """Why the weights of a recipe cannot be rounded in training (`precision.quantize_weights`). tensor: `parallel.tensor`."""
    if precision.quantize_weights == "none":
        return []
    key = "precision.quantize_weights"
    shapes = {name: shape for _, name, shape in stored_linears(model)}
    found = format_problems(weight_format(precision.quantize_weights), shapes, key=key)
    if precision.backend not in ("auto", "reference"):
        text = (
            f"{key}={precision.quantize_weights}: only the reference backend rounds weights, not {precision.backend}."
        )
        found.append(Problem("precision.backend", text, "Use precision.backend=reference."))
    if precision.scaling != "none" or (precision.switch_at_tokens is not None and precision.scaling_after != "none"):
        text = f"{key}={precision.quantize_weights} and a low-precision scaling would both round the weights."
        found.append(Problem("precision.scaling", text, "Use precision.scaling=none and switch_at_tokens=null."))
    if tensor > 1:
        text = f"{key}={precision.quantize_weights} with parallel.tensor={tensor}: scales of split matrices are not supported."
        found.append(Problem("parallel.tensor", text, "Use parallel.tensor=1."))
    return found
