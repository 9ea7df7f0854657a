"""The weights of `stratum hf export --quantize`: the tensors that replace a linear layer's weight, and the model to compare with.

Quantizer.matrix(name, weight)   -> codes and scales: calibrated ones, or the nearest codes
Quantizer.apply(model)              the same numbers as dense weights in our model, for the comparison with transformers
"""

import argparse
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recipes.schema.encoder_rules import without_encoders_problems
from recipes.schema.errors import BackendError, RecipeError, refuse
from recipes.schema.expert_rules import dense_problems
from recipes.schema.objective_rules import language_model_problems, without_mtp_problems
from recipes.schema.precision import PrecisionConfig
from recipes.schema.recipe import Recipe
from recipes.schema.suggestions import did_you_mean
from recipes.schema.weight_formats import WeightFormat, format_problems, weight_format
from train.build import model_on_one_rank
from train.checkpoint.tensors import StoredTensors
from train.hf.config import family_of
from train.hf.files import Entry, WeightFiles
from train.megatron import choose_device
from train.model.quantized_linear import round_inputs
from train.quantize.calibrate import calibrated, calibration_rows
from train.quantize.directory import KEY, QuantizedFiles, is_quantized, to_config
from train.quantize.parts import Linear, linears
from train.quantize.rounding import CODES, QuantizedMatrix, quantize

_TYPES = {"weight_packed": torch.int32, "weight_shape": torch.int64}


@dataclass(frozen=True)
class Quantizer:
    """How the linear layers of one export are quantised."""

    form: WeightFormat
    scale_dtype: torch.dtype
    linears: dict[str, Linear]
    """By the names of their weights in the files."""
    matrices: dict[str, QuantizedMatrix]
    """By the names of the matrices, without `.weight`: the calibrated ones, and those rounded to nearest so far."""
    unquantized: tuple[str, ...]
    """Linear layers that keep their format, by the last part of their names in the files."""

    def entries(self, name: str, shape: tuple[int, ...]) -> list[Entry]:
        """The stored tensors of a quantised weight."""
        rows, columns = shape
        types = _TYPES | {"weight": CODES[self.form.codes], "weight_scale": self.scale_dtype}
        found = self.form.stored_shapes((rows, columns))
        return [Entry(f"{name.removesuffix('weight')}{last}", size, types[last]) for last, (size, _) in found.items()]

    def tensors(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of `entries`."""
        for last, tensor in self.matrix(name, weight).stored().items():
            yield f"{name.removesuffix('weight')}{last}", tensor

    def matrix(self, name: str, weight: torch.Tensor) -> QuantizedMatrix:
        """The quantised weight of a name. It is stored, so that the comparison uses the codes that were written."""
        key = name.removesuffix(".weight")
        if key not in self.matrices:
            self.matrices[key] = quantize(weight, self.form, name=name, scale_dtype=self.scale_dtype)
        return self.matrices[key]

    @torch.no_grad()
    def apply(self, chunk: Any, *, with_inputs: bool = False) -> None:
        """Round the weights of a whole model on one rank. with_inputs: from then on also the inputs of the layers, if the format
        does that."""
        for linear in {id(one): one for one in self.linears.values()}.values():
            module = chunk.decoder.layers[linear.layer].get_submodule(linear.name)
            names = zip(linear.pair.theirs, linear.split(module.weight), strict=True)
            parts = [self.matrix(name, part).dense(module.weight.dtype) for name, part in names]
            module.weight.copy_(linear.join(parts))
            if with_inputs:
                round_inputs(module, self.form)

    @property
    def config(self) -> dict[str, Any]:
        """The entry in config.json."""
        # A pattern, because the files' names are not those of the modules: transformers and vLLM rename `backbone.`.
        return {KEY: to_config(self.form, ignore=["lm_head", *(f"re:.*\\.{name}$" for name in self.unquantized)])}


def open_quantizer(parsed: argparse.Namespace, recipe: Recipe, checkpoint: Path) -> Quantizer | None:
    """The quantizer of an export's options; None without --quantize. Calibration happens here.

    Raises RecipeError, DataError and NumericsError; BackendError if the result could not be compared.
    """
    if parsed.quantize is None:
        for option in ("calibrate", "keep"):
            if getattr(parsed, option):
                raise RecipeError(f"--{option} needs a format: --quantize int4-g32.")
        return None
    refuse(language_model_problems(recipe.model, place=f"--quantize {parsed.quantize}: {checkpoint}", key="--quantize"))
    refuse(dense_problems(recipe.model, place=str(checkpoint), what=f"--quantize {parsed.quantize}", key="--quantize"))
    refuse(without_encoders_problems(recipe.model, place=str(checkpoint), what="--quantize", key="--quantize"))
    refuse(without_mtp_problems(recipe.model, place=str(checkpoint), what="--quantize", key="--quantize"))
    form, family = weight_format(parsed.quantize), family_of(recipe.model)
    if not parsed.no_check and importlib.util.find_spec("compressed_tensors") is None:
        raise BackendError(
            "--quantize compares the result with transformers, which needs compressed-tensors: pip install -e '.[hf]'. "
            "--no-check writes without comparing."
        )
    unquantized = tuple(parsed.keep or ())
    every = linears(recipe.model, family)
    last_names = {part.rpartition(".")[2] for linear in every for part in linear.parts}
    for name in unquantized:
        if name not in last_names:
            hint = did_you_mean(name, last_names, otherwise=f"There are: {', '.join(sorted(last_names))}.")
            raise RecipeError(f"--keep {name}: the model has no such linear layer. {hint}")
    found = [linear for linear in every if not any(part.rpartition(".")[2] in unquantized for part in linear.parts)]
    if not found:
        raise RecipeError(f"--keep {' '.join(unquantized)} leaves no linear layer to quantise. Name fewer.")
    shapes = {
        name.rpartition(".")[0].rpartition(".")[2]: shape for one in found for name, shape in one.pair.theirs.items()
    }
    refuse(format_problems(form, shapes, key="--quantize"))
    weights = StoredTensors(checkpoint).weights
    stored = weights[next(iter(found[0].pair.ours))].dtype
    scale_dtype = {"keep": stored, "fp32": torch.float32, "bf16": torch.bfloat16}[parsed.dtype]
    matrices: dict[str, QuantizedMatrix] = {}
    if parsed.calibrate:
        rows = calibration_rows(recipe, parsed.calibrate)
        plain = replace(recipe, precision=PrecisionConfig(params="fp32"))
        with model_on_one_rank(plain, checkpoint, device=choose_device(parsed.device)) as chunk:
            matrices = calibrated(
                chunk,
                rows,
                form,
                chosen=found,
                scale_dtype=scale_dtype,
                reset_at_documents=recipe.data.reset_at_documents,
            )
    return Quantizer(
        form, scale_dtype, {name: linear for linear in found for name in linear.pair.theirs}, matrices, unquantized
    )


def open_weights(folder: Path) -> WeightFiles:
    """The weight files of a directory; quantised weights are read as dense ones."""
    return QuantizedFiles(folder) if is_quantized(folder) else WeightFiles(folder)
