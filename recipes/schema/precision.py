"""Fields of the `precision` group: number formats, and which modules multiply.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, PositiveFloat, PositiveFraction, PositiveInt


@dataclass(frozen=True)
class LinearRule:
    """The scaling of the linear layers that match all of these fields. The first rule that matches a linear layer decides."""

    scaling: Literal["none", "current", "blockwise", "mxfp8", "nvfp4"]
    """Their scaling, instead of `precision.scaling`; `none`: high precision."""
    kinds: str = ""
    """Letters of `model.pattern`: layers of these kinds only; empty: of all kinds."""
    linears: str = "*"
    """Names inside the layer, with `*` for any text: `self_attention.linear_qkv` and `linear_proj`, `mixer.in_proj` and
    `out_proj`, `mlp.linear_fc1` and `linear_fc2`, `mlp.experts.*`, `mlp.shared_experts.*`."""
    last_fraction: PositiveFraction = 1.0
    """Only layers in this last part of the pattern, rounded to whole layers."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats, and which modules multiply."""

    params: Literal["fp32", "bf16"] = "fp32"
    """Format of weights and activations. Masters, moments, gradient sums, A_log, D and dt_bias are always fp32."""
    backend: Literal["auto", "reference", "emulated", "te"] = "auto"
    """`te`: Transformer Engine modules and mamba-ssm kernels on a GPU. `reference`: plain torch on any device, high precision
    only. `emulated`: `reference` with the low-precision numbers computed exactly, on any device. `auto`: `te` with a GPU and
    both packages, otherwise `emulated` if `scaling` is a low-precision recipe, otherwise `reference`."""
    scaling: Literal["none", "delayed", "current", "blockwise", "mxfp8", "nvfp4", "unscaled"] = "none"
    """Low-precision recipe of the linear layers' GEMMs (docs/fp8.md). `none`: all in `params`. `delayed`: one scale per
    tensor, from earlier steps. `current`: one scale per tensor, from the tensor. `blockwise`: 1x128 and 128x128 blocks
    (Nemotron Nano 2, DeepSeek-V3). `mxfp8`: 1x32 blocks. `nvfp4`: 4 bits, 1x16 blocks. `unscaled`: FP8 without scales, an
    example of what goes wrong; `emulated` only."""
    power_of_two_scales: bool = True
    """For `blockwise`: round scales down to powers of two; false: keep them in fp32."""
    amax_history: PositiveInt = 1024
    """For `delayed`: number of earlier steps from whose largest magnitudes a scale is computed."""
    amax_from: Literal["max", "most_recent"] = "max"
    """For `delayed`: compute the scale from the largest entry of the history, or from the last one."""
    high_precision_first: Count = 0
    """Number of layers at the start of the pattern that stay in `params` precision."""
    high_precision_last: Count = 0
    """Number of layers at the end of the pattern that stay in `params` precision (Nemotron Nano 2: two at each end)."""
    rules: tuple[LinearRule, ...] = ()
    """Other scalings for some linear layers, in order; for steps whose scaling is not `none`. Nemotron 3 Super: precision group
    `nemotron3_super`. Layers of `high_precision_first` and `high_precision_last` are not affected."""
    switch_at_tokens: Count | None = None
    """From the first step at or after this many tokens on, use `scaling_after`; null: never."""
    scaling_after: Literal["none", "delayed", "current", "blockwise", "mxfp8", "nvfp4", "unscaled"] = "none"
    """Scaling after the switch: `none` ends training in high precision."""
    quantize_weights: Literal["none", "int8", "int4-g32", "int4-g128", "fp8-block"] = "none"
    """Round the weights of the linear layers to this format at each step, as `stratum hf export --quantize` will. The gradient
    updates the unrounded weight. Meant for distillation from the unquantised model (docs/quantize.md)."""
    fp8_weights: bool = False
    """For `te`: store weights in FP8 between steps and gather them in FP8 over data-parallel ranks."""
    health: bool = True
    """Measure quantisation errors at the logging interval (`emulated`): precision.jsonl in the run's folder."""
    health_policy: Literal["warn", "high_precision"] = "warn"
    """When an operand's signal-to-noise ratio is outside its band: `warn` only, or also use `high_precision` in that linear layer
    for the rest of the run."""
    health_floor_db: PositiveFloat | None = None
    """Lower end of the band, in dB; null: the format's own, E4M3 20, E5M2 15, E2M1 10."""
