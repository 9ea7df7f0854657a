"""Layers with a second norm on their output, before the residual addition (Gemma 2, arXiv 2408.00118, section 2).

    x + post_norm(layer(norm(x)))

Megatron's layers end in a replaceable bias-dropout-add function; these classes replace it by norm and addition. In
checkpoints the weight is the layer's `post_norm.weight`.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

Residual = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


class _PostNormed:
    """Mixin for a Megatron layer; `ending` names its attribute that holds the bias-dropout-add function."""

    ending: str

    def __init__(self, config: Any, *args: Any, norm: type, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.post_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        setattr(self, self.ending, self._normed_add)

    def _normed_add(self, training: bool, fused: bool) -> Residual:
        def add(output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, _p: float) -> torch.Tensor:
            x, bias = output
            assert bias is None, "layers here have no biases"
            return residual + self.post_norm(x)

        return add


class PostNormAttention(_PostNormed, TransformerLayer):
    """An attention layer with a norm after it."""

    ending = "self_attn_bda"


class PostNormMLP(_PostNormed, MLPLayer):
    """An MLP layer with a norm after it."""

    ending = "mlp_bda"


class PostNormMamba(_PostNormed, MambaLayer):
    """A Mamba-2 layer with a norm after it."""

    ending = "mamba_bda"
