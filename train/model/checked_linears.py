"""Which linear layers have their products checked (`run.integrity.products`). The layers find their check by themselves."""

from collections.abc import Collection
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from recipes.schema.integrity import CHECKED_KINDS
from recipes.schema.pattern import layer_kinds
from train.model.grouped_linear import GroupedLinear
from train.native.product_check import ProductCheck


def attach_checks(chunk: Any, *, pattern: str, kinds: Collection[str]) -> None:
    """Give every linear layer of these kinds a check, before the backend equips the chunk. Routers, embeddings and heads with one
    output have none."""
    letters = layer_kinds(pattern)
    for layer in chunk.decoder.layers:
        index = layer.layer_number - 1
        if CHECKED_KINDS[letters[index]] not in kinds:
            continue
        for name, part in layer.named_modules():
            if isinstance(part, ColumnParallelLinear | RowParallelLinear | GroupedLinear | nn.Linear):
                part.product_check = ProductCheck(f"layer {index} {name}")  # type: ignore[assignment]
    head = getattr(chunk, "output_layer", None)
    if "output" in kinds and isinstance(head, ColumnParallelLinear):
        head.product_check = ProductCheck("output layer")  # type: ignore[assignment]
