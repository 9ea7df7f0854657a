"""Multi-token prediction: further depths, each of which predicts one more token from the depth before it.

    hidden state of token t --norm--+
                                    +--concatenated, projected--> layers --norm--> hidden state, from which the shared head
    embedding of token t + k --norm-+                                              predicts token t + k + 1

The module is Megatron-Core's `MultiTokenPredictionLayer` (arXiv 2412.19437, section 2.2, equations 21 to 23), with its names in
checkpoints. The order of work, the shifted tokens and the losses are this project's: Megatron's shift needs CUDA under context
parallelism, does not know documents by index, and its losses are kept in a global of the process.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from recipes.schema.model import ModelConfig
from recipes.schema.pattern import LayerKind, layer_kinds, mtp_kinds
from train.model.context import RowContext
from train.model.experts import ExpertLayer


@dataclass(frozen=True)
class Ahead:
    """What the further depths read and predict; D depths, B rows, S tokens of this rank."""

    tokens_DBS: torch.Tensor
    """Ids of tokens t + 1, t + 2, ...; 0 beyond the row."""
    labels_DBS: torch.Tensor
    """Ids of tokens t + 2, t + 3, ...; 0 beyond the row."""
    learned_DBS: torch.Tensor
    """Labels that count: in the row, in the document of token t, and learned (`Batch.learned`)."""


class Depth(MultiTokenPredictionLayer):
    """One further depth, in high precision whatever the model's scaling is."""

    def __init__(
        self, config: TransformerConfig, *args: Any, model: ModelConfig, layer_number: int, **named: Any
    ) -> None:
        own = copy(config)
        own.fp8 = own.fp4 = None
        # Megatron numbers the layers of a depth from 1, so the table of windows must be theirs.
        for field, value in window_options(model, mtp_kinds(model)).items():
            setattr(own, field, value)
        super().__init__(own, *args, layer_number=layer_number, **named)
        # Readings of loads continue the numbers of the model's layers.
        before = len(layer_kinds(model.pattern)) + (layer_number - 1) * len(mtp_kinds(model))
        for index, layer in enumerate(self.mtp_model_layer.layers):
            if isinstance(getattr(layer, "mlp", None), ExpertLayer):
                layer.mlp.layer_number = before + index + 1

    def further(
        self, hidden_SBH: torch.Tensor, embedded_SBH: torch.Tensor, *, context: RowContext | None
    ) -> torch.Tensor:
        """Hidden states of this depth, after its norm, from those of the depth before it and the embeddings of later tokens.

        Both are [sequence of this rank, rows, hidden]. Collective over the tensor and context groups.
        """
        # Megatron's public methods shift the tokens themselves, or cut the gradient.
        return self._proj_and_transformer_layer(hidden_SBH, embedded_SBH, packed_seq_params=context)


def window_options(model: ModelConfig, kinds: list[LayerKind]) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that say which layers attend over a window."""
    if "w" not in kinds:
        return {"window_size": None, "window_attn_skip_freq": None}
    return {
        "window_size": (model.window_tokens - 1, 0),
        "window_attn_skip_freq": [int(kind == "w") for kind in kinds],
    }


def depths_spec(model: ModelConfig, *, norm: Any, linear: Any) -> ModuleSpec | None:
    """Megatron's spec of the further depths; None without any. norm, linear: the backend's classes."""
    if not model.mtp.depths:
        return None
    parts = MultiTokenPredictionLayerSubmodules(enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=linear)
    depth = ModuleSpec(module=Depth, params={"model": model}, submodules=parts)
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[depth])
    )
