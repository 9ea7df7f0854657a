"""The Transformer Engine part of the `te` backend; no other module imports Transformer Engine.

Megatron owns the modules and enters Transformer Engine's autocast around each layer. This module selects the modules,
translates a recipe's scaling into Megatron's fields, and switches the scaling during a run.

**Not run on a GPU.** On a CPU, Transformer Engine's Python layer and Megatron's Transformer Engine modules run over a
replacement of its compiled extension, with its own reference quantisers (tests/parity/test_te.py); the native kernels,
the native recipes' quantisers and FP8 primary weights have not been run. docs/fp8.md lists what has not been run.
"""

import functools
import os
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe

from recipes.schema.errors import BackendError, refuse
from recipes.schema.facts import wants_fp32_block_scales
from recipes.schema.model import ModelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.rules import block_scale_problems, low_precision_problems
from recipes.schema.scaling import active_scaling, low_precision_linears, rule_numbers, scalings_used
from train.parallel.mesh import Mesh
from train.precision.control import PrecisionControl, Reading


def megatron_fields(precision: PrecisionConfig, scaling: str) -> dict[str, Any]:
    """Megatron's TransformerConfig fields that select a scaling. All are always set, so one scaling can replace another."""
    off: dict[str, Any] = {"fp8": None, "fp8_recipe": "delayed", "fp4": None}
    match scaling:
        case "none":
            return off
        case "delayed":
            return off | {"fp8": "hybrid"}
        case "current":
            return off | {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
        case "blockwise":
            return off | {"fp8": "e4m3", "fp8_recipe": "blockwise"}
        case "mxfp8":
            return off | {"fp8": "e4m3", "fp8_recipe": "mxfp8"}
        case "nvfp4":
            return off | {"fp4": "e2m1"}
        case other:
            raise BackendError(f"precision.scaling={other}: Transformer Engine has no such recipe.")


class TransformerEngineModules:
    """Megatron's Transformer Engine modules and their precision; `train.model.backend` adds the mixer.

    The imports are inside the methods because Transformer Engine is optional.
    """

    name = "te"

    def column_parallel_linear(self) -> type:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        return TEColumnParallelLinear

    def row_parallel_linear(self) -> type:
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        return TERowParallelLinear

    def column_parallel_layer_norm_linear(self) -> type | None:
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

        return TELayerNormColumnParallelLinear

    def norm(self) -> type:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm

    def core_attention(self) -> type:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention

    def options(self, model: ModelConfig, precision: PrecisionConfig) -> dict[str, Any]:
        # Transformer Engine reads the kind of block scales from the environment at import, so a recipe cannot set it here.
        fp32 = wants_fp32_block_scales(os.environ)
        refuse([*low_precision_problems(precision), *block_scale_problems(precision, fp32=fp32)], BackendError)
        first, last = precision.high_precision_first, precision.high_precision_last
        by_megatron = bool(first or last) and not _uses_delayed(precision)
        return megatron_fields(precision, precision.scaling) | {
            "fp8_amax_history_len": precision.amax_history,
            "fp8_amax_compute_algo": precision.amax_from,
            "fp8_param": precision.fp8_weights,
            "first_last_layers_bf16": by_megatron,
            "num_layers_at_start_in_bf16": first if by_megatron else 0,
            "num_layers_at_end_in_bf16": last if by_megatron else 0,
        }

    def equip(self, chunk: torch.nn.Module, *, model: ModelConfig, precision: PrecisionConfig) -> None:
        """Linears that `precision.rules` decides: their own quantisation inside the layer's autocast. It is set here, because
        Megatron's patterns of names count the layers of a pipeline stage, and its constructor resets what was set before.

        Delayed scaling: keep the recipe's high-precision layers, which Megatron refuses, and store scales in buffers.

        Delayed scaling needs one autocast around the whole stack, so Megatron cannot exclude single layers. An inner,
        disabled autocast can, and does not affect the amax reduction at the end of the outer one.

        Scales and histories get the same buffers as in the emulated backend. Transformer Engine would store them as pickled
        objects, and refuses to load those.
        """
        for index, names in rule_numbers(model, precision).items():
            for layer in (layer for layer in chunk.decoder.layers if layer.layer_number - 1 == index):  # type: ignore[union-attr]
                for name, number in names.items():
                    layer.get_submodule(name).te_quant_params = _quantization(
                        precision, precision.rules[number].scaling
                    )
        if not _uses_delayed(precision):
            return
        low = low_precision_linears(model, precision)
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            index = layer.layer_number - 1
            if low and index not in low:
                layer.forward = functools.partial(_without_low_precision, layer.forward)
            for name in low.get(index, ()):
                _keep_scales_in_buffers(layer.get_submodule(name), precision)

    def control(self, chunks: list[Any], *, precision: PrecisionConfig, mesh: Mesh, seed: int) -> PrecisionControl:
        return _TransformerEnginePrecision(chunks, precision, shards=mesh.layout.data * mesh.layout.context)


class _TransformerEnginePrecision:
    """Switches scaling at a token count. Amaxes, scales and their reduction are Transformer Engine's own."""

    def __init__(self, chunks: list[Any], precision: PrecisionConfig, *, shards: int) -> None:
        """shards: data-parallel times context ranks; gradient scales are stored for one (`train.precision.emulated`)."""
        parts = [part for chunk in chunks for part in chunk.modules()]
        # Further depths (`train.model.mtp`) are always in high precision.
        stacks = [part for part in parts if hasattr(part, "layer_type_list") and not part.is_mtp_layer]
        self.delayed = [part for part in parts if hasattr(part, "low_precision_scale")]
        self.shards = shards
        self.configs = [stack.config for stack in stacks]
        self.precision = precision
        self.name: str = precision.scaling

    def active(self) -> str:
        return self.name

    def begin_step(self, *, step: int, tokens: int, measure: bool = False) -> None:
        scaling = active_scaling(self.precision, tokens)
        name = "none" if scaling is None else scaling.name
        if name != self.name:
            for config in self.configs:
                for field, value in megatron_fields(self.precision, name).items():
                    setattr(config, field, value)
            self.name = name

    def finish_step(self) -> None: ...

    def gather_state(self) -> None:
        for part in self.delayed:
            if "scaling_bwd" not in part.fp8_meta:
                continue  # no step has run yet, so the buffers are up to date
            forward, backward = part.fp8_meta["scaling_fwd"], part.fp8_meta["scaling_bwd"]
            part.low_precision_scale[:2] = forward.scale[:2]
            part.low_precision_scale[2] = backward.scale[0] * self.shards
            part.low_precision_history[:, :2] = forward.amax_history[:, :2]
            part.low_precision_history[:, 2] = backward.amax_history[:, 0] / self.shards

    def apply_state(self) -> None:
        if not self.delayed or self.precision.scaling != "delayed":
            return
        recipe = get_fp8_recipe(self.configs[0])
        for part in self.delayed:
            part.fp8_meta |= {"num_gemms": 1, "recipe": recipe}
            part.init_fp8_meta_tensors(recipe)
            forward, backward = part.fp8_meta["scaling_fwd"], part.fp8_meta["scaling_bwd"]
            forward.scale[:2] = part.low_precision_scale[:2]
            backward.scale[0] = part.low_precision_scale[2] / self.shards
            forward.amax_history[:, :2] = part.low_precision_history[:, :2]
            backward.amax_history[:, 0] = part.low_precision_history[:, 2] * self.shards

    def health(self) -> list[Reading]:
        return []


def _keep_scales_in_buffers(part: torch.nn.Module, precision: PrecisionConfig) -> None:
    """Buffers for input, weight and gradient as in `train.precision.emulated`, instead of pickled extra state."""
    device = part.weight.device
    part.register_buffer("low_precision_scale", torch.ones(3, device=device))  # type: ignore[arg-type]
    part.register_buffer("low_precision_history", torch.zeros(precision.amax_history, 3, device=device))  # type: ignore[arg-type]
    part.register_buffer("low_precision_off", torch.zeros(1, device=device))  # type: ignore[arg-type]
    part.get_extra_state = lambda: torch.empty(0, dtype=torch.uint8)  # type: ignore[method-assign,assignment]
    part.set_extra_state = lambda state: None  # type: ignore[method-assign,assignment]


def _quantization(precision: PrecisionConfig, scaling: str) -> Any:
    """Megatron's parameters for a linear with a scaling of its own."""
    # Imports here: Transformer Engine is an optional package.
    from megatron.core.enums import Fp4Recipe, Fp8Recipe
    from megatron.core.extensions.transformer_engine import TEQuantizationParams, TEQuantizationRecipe

    fields = megatron_fields(precision, scaling)
    recipe = TEQuantizationRecipe()  # high precision
    if fields["fp8"] is not None:
        recipe = TEQuantizationRecipe(fp8_quantization_recipe=Fp8Recipe(fields["fp8_recipe"]), fp8_format=fields["fp8"])
    elif fields["fp4"] is not None:
        recipe = TEQuantizationRecipe(fp4_quantization_recipe=Fp4Recipe.nvfp4)
    return TEQuantizationParams(training_recipe=recipe, evaluation_recipe=None)


def _uses_delayed(precision: PrecisionConfig) -> bool:
    return "delayed" in scalings_used(precision)


def _without_low_precision(forward: Any, *args: Any, **kwargs: Any) -> Any:
    import transformer_engine.pytorch as te

    with te.autocast(enabled=False):
        return forward(*args, **kwargs)
