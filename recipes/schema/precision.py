"""Fields of the `precision` group: number formats, and which modules multiply.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats, and who multiplies."""

    params: Literal["fp32", "bf16"] = "fp32"
    """Format of weights and activations. Masters, moments and gradient sums are always fp32; so are A_log, D, dt_bias."""
    backend: Literal["auto", "reference", "emulated", "te"] = "auto"
    """`te`: Transformer Engine modules and mamba-ssm kernels on a GPU; `reference`: plain torch on any device, high
    precision only; `emulated`: `reference` with the low-precision numbers computed exactly, on any device; `auto`: `te`
    where a GPU and both packages are there, else `emulated` if `scaling` asks for low precision, else `reference`."""
    scaling: Literal["none", "delayed", "current", "blockwise", "mxfp8", "nvfp4", "unscaled"] = "none"
    """Low-precision recipe of the linear layers' GEMMs (docs/fp8.md). `none`: all in `params`. `delayed`: one scale a
    tensor, from earlier steps. `current`: one scale a tensor, from the tensor. `blockwise`: 1x128 and 128x128 blocks
    (Nemotron Nano 2, DeepSeek-V3). `mxfp8`: 1x32 blocks. `nvfp4`: 4 bits, 1x16 blocks. `unscaled`: FP8 without scales, an
    example of what goes wrong; `emulated` only."""
    power_of_two_scales: bool = True
    """`blockwise`: round scales down to powers of two; false keeps them fp32."""
    amax_history: PositiveInt = 1024
    """`delayed`: steps whose largest magnitudes a scale looks back on."""
    amax_from: Literal["max", "most_recent"] = "max"
    """`delayed`: the scale follows the largest of the history, or its last entry."""
    high_precision_first: Count = 0
    """Layers at the start of the pattern that stay in `params` precision."""
    high_precision_last: Count = 0
    """Layers at the end of the pattern that stay in `params` precision (Nemotron Nano 2: two at each end)."""
    switch_at_tokens: Count | None = None
    """From the first step at or after this many tokens on, use `scaling_after`; null never switches."""
    scaling_after: Literal["none", "delayed", "current", "blockwise", "mxfp8", "nvfp4", "unscaled"] = "none"
    """Scaling after the switch: `none` ends training in high precision."""
    quantize_weights: Literal["none", "int8", "int4-g32", "int4-g128", "fp8-block"] = "none"
    """Round the weights of the linear layers to this format at each step, as `stratum hf export --quantize` will; the gradient
    goes to the unrounded weight. Meant for distillation from the unquantised model (docs/quantize.md)."""
    fp8_weights: bool = False
    """`te`: keep weights in FP8 between steps and gather them in FP8 over data-parallel ranks."""
    health: bool = True
    """Measure quantisation errors at the logging interval (`emulated`): precision.jsonl in the run's folder."""
    health_policy: Literal["warn", "high_precision"] = "warn"
    """When an operand's signal-to-noise ratio leaves its band: say so, or also move that linear layer to high precision for
    the rest of the run."""
    health_floor_db: PositiveFloat | None = None
    """Lower end of the band, in dB; null takes the format's own: E4M3 20, E5M2 15, E2M1 10."""
