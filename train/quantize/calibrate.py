"""Quantises a model layer by layer, with the inputs that its linear layers have on real rows (GPTQ).

    training rows --embedding--> hidden --layer 0--> hidden --layer 1--> ...
                                             |
                     Hessian of each linear layer's inputs --GPTQ--> codes and scales

The inputs of a layer come from the quantised layers before it, and those of its second linear layer from its quantised first one.
So later layers correct earlier errors. The forward pass is that of training, with document boundaries. In addition to the model,
memory contains the hidden states of all rows and the Hessian of one linear layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.batch import Batch
from recipes.schema.errors import DataError
from recipes.schema.recipe import Recipe
from recipes.schema.weight_formats import WeightFormat
from train.build import open_data
from train.model.context import RowContext
from train.quantize.gptq import gptq, inverse_factor
from train.quantize.parts import Linear
from train.quantize.rounding import QuantizedMatrix


def calibration_rows(recipe: Recipe, count: int) -> list[Batch]:
    """Training rows spread evenly over a run, one per batch. DataError if its data is not prepared or it has fewer rows."""
    total = recipe.run.steps * recipe.run.global_rows
    if count > total:
        raise DataError(f"--calibrate {count:,}: the run has {total:,} training rows. Use --calibrate {total} or less.")
    try:
        dataset = open_data(recipe)
    except DataError as error:
        raise DataError(
            f"{error} --calibrate reads training rows of the run's prepared data; without it, weights are rounded to the "
            f"nearest code."
        ) from error
    rows = dataset.training_rows(np.linspace(0, total - 1, count).astype(np.int64))
    return [rows.part(at, at + 1) for at in range(count)]


@torch.no_grad()
def calibrated(
    chunk: Any,
    rows: Sequence[Batch],
    form: WeightFormat,
    *,
    chosen: Sequence[Linear],
    scale_dtype: torch.dtype = torch.float32,
    reset_at_documents: bool = False,
) -> dict[str, QuantizedMatrix]:
    """Quantise the chosen linear layers of a whole model on one rank. -> matrices by their names in the files, without `.weight`.

    The weights in the model are replaced by the quantised ones. Raises NumericsError if the rows give NaN or infinity.
    """
    device = next(chunk.parameters()).device
    hidden, contexts = [], []
    for row in rows:
        tokens = row.tokens.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        hidden.append(chunk.embedding(input_ids=tokens, position_ids=positions))
        documents = row.document_index if reset_at_documents else None
        contexts.append(None if documents is None else RowContext(documents=documents.to(device)))
    found: dict[str, QuantizedMatrix] = {}
    of_layer: dict[int, list[Linear]] = {}
    for linear in chosen:
        of_layer.setdefault(linear.layer, []).append(linear)
    for index, layer in enumerate(chunk.decoder.layers):
        for linear in of_layer.get(index, ()):
            module = layer.get_submodule(linear.name)
            name = f"layer {index} {linear.name}"
            hessian = _hessian(layer, module, hidden, contexts)
            factor = inverse_factor(hessian, name=name)
            matrices = [
                gptq(part, hessian, form, factor=factor, scale_dtype=scale_dtype)
                for part in linear.split(module.weight)
            ]
            module.weight.copy_(linear.join([matrix.dense(module.weight.dtype) for matrix in matrices]))
            found |= dict(zip(linear.parts, matrices, strict=True))
        hidden = [_run(layer, states, context) for states, context in zip(hidden, contexts, strict=True)]
    return found


def _hessian(layer: Any, module: Any, hidden: Sequence[torch.Tensor], contexts: Sequence[Any]) -> torch.Tensor:
    """Sum of x x' over the inputs x of a linear layer, fp32 [inputs, inputs]."""
    total = torch.zeros(module.weight.shape[1], module.weight.shape[1], device=module.weight.device)

    def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        total.addmm_(rows.t(), rows)

    handle = module.register_forward_pre_hook(add)
    try:
        for states, context in zip(hidden, contexts, strict=True):
            _run(layer, states, context)
    finally:
        handle.remove()
    return total


def _run(layer: Any, states: torch.Tensor, context: RowContext | None) -> torch.Tensor:
    output = layer(hidden_states=states, attention_mask=None, packed_seq_params=context)
    return output[0] if isinstance(output, tuple) else output
