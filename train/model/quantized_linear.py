"""Linear layers with quantised weights: rounded at each step of training, or stored as codes and scales for inference.

    train_rounded(chunk)       training: the product uses the rounded weight, the gradient goes to the weight itself
    store_quantized(layer)     inference: layers keep codes and scales, and compute their weight for each product
    round_inputs(layer)        inference: a layer's inputs are rounded too (`w8a8` formats)

The first two take the place of the weight only (`train.model.linear.take_weight_from`); no other code knows of them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from recipes.schema.model import ModelConfig
from recipes.schema.weight_formats import WeightFormat
from train.model.linear import take_weight_from
from train.quantize.parts import Linear, linears_of_any
from train.quantize.rounding import QuantizedMatrix, quantize, rounded_tokens


class _Straight(torch.autograd.Function):
    """The rounded weight forward, the gradient unchanged backward (straight-through estimator, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, stored: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


class RoundedWeight:
    """A weight rounded to a format whenever it is used; scales follow its present values."""

    def __init__(self, linear: Linear, form: WeightFormat) -> None:
        self.linear = linear
        self.form = form

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """The dequantised weight, with the gradient of `stored`. CheckpointError if it is not finite."""
        return _Straight.apply(stored, rounded(stored.detach(), self.linear, self.form))


def rounded(weight: torch.Tensor, linear: Linear, form: WeightFormat) -> torch.Tensor:
    """A whole weight rounded to the nearest codes of each of its matrices, in its own format."""
    parts = zip(linear.parts, linear.split(weight), strict=True)
    return linear.join([quantize(part, form, name=name, scale_dtype=weight.dtype).dense() for name, part in parts])


def train_rounded(chunk: Any, model: ModelConfig, form: WeightFormat) -> None:
    """Round the weights of every linear layer in a freshly built chunk at each forward pass. One tensor rank only."""
    layers = {layer.layer_number - 1: layer for layer in chunk.decoder.layers}
    for linear in linears_of_any(model):
        if linear.layer in layers:
            take_weight_from(layers[linear.layer].get_submodule(linear.name), RoundedWeight(linear, form))


class StoredMatrices(torch.nn.Module):
    """Codes and scales of a linear layer, as buffers with the bytes that the files have."""

    def __init__(self, linear: Linear, matrices: Sequence[QuantizedMatrix], *, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self.dtype = dtype
        self.forms = [matrix.form for matrix in matrices]
        self.names = [list(matrix.stored()) for matrix in matrices]
        for index, matrix in enumerate(matrices):
            for name, tensor in matrix.stored().items():
                self.register_buffer(f"{name}_{index}", tensor)

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """The dequantised weight; `stored` is a placeholder."""
        parts = []
        for index, (form, names) in enumerate(zip(self.forms, self.names, strict=True)):
            tensors = {name: self.get_buffer(f"{name}_{index}") for name in names}
            parts.append(QuantizedMatrix.from_stored(form, tensors).dense(self.dtype))
        return self.linear.join(parts)


def store_quantized(module: Any, linear: Linear, matrices: Sequence[QuantizedMatrix]) -> None:
    """Replace the weight of a parallel linear layer by quantised matrices. Its parameter becomes an empty placeholder."""
    dtype, device = module.weight.dtype, module.weight.device
    source = StoredMatrices(linear, matrices, dtype=dtype).to(device)
    module.weight = torch.nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
    module.quantized = source
    take_weight_from(module, source)
    round_inputs(module, matrices[0].form)


def round_inputs(module: torch.nn.Module, form: WeightFormat) -> None:
    """Make a linear layer round its inputs token by token, if the format does that."""
    if form.rounds_inputs:
        module.register_forward_pre_hook(lambda _, inputs: (rounded_tokens(inputs[0], form), *inputs[1:]))
