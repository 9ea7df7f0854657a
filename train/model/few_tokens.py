"""The forward pass of a step of inference with few new tokens, in few calls: for such a step Megatron's layers and autograd
cost more time than the arithmetic.

    layer: hidden --[norm, projection]--> --[scan | attention | nothing]--> --[norm, projection, post-norm, + hidden]-->

The arithmetic is that of the layers' own modules (`few_rows.c`, `scan.c`, `attention.c`; the definitions are in `norm.py`,
`linear.py`, `activation.py`, `ssd.py`, `paged.py`); the weights are the modules' own tensors. A layer of another kind, or built
from other modules, is called as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from train.model.activation import FeedForward
from train.model.adapters import Adapter
from train.model.attention import AttentionCore
from train.model.context import RowContext, Segments
from train.model.linear import fast_linear
from train.model.mixer import ReferenceMixer
from train.model.norm import RMSNorm
from train.model.postnorm import PostNormAttention, PostNormMamba, PostNormMLP
from train.model.ssd import mamba_core_segments
from train.native import attention as compiled_attention
from train.native.few_rows import FewRows, Memory, NormWeight, usable
from train.native.scan import STEPWISE_TOKENS

Layer = Callable[[torch.Tensor, Segments], torch.Tensor]
"""hidden states [T, hidden] of the texts' new tokens -> the next hidden states."""


MOST = 64
"""Tokens of such a step; for more, a product of matrices is faster (measured: equal at about 100)."""
MOST_OF_A_TEXT = STEPWISE_TOKENS
"""Tokens of one text in such a step."""


class FewTokens:
    """Layers, final norm and head of a model, prepared: the weights of products are copied in the order in which they are read.

    Weights must stay where they are in memory; after a change of their values call `pack`.
    """

    def __init__(self, model: Any) -> None:
        self._make = _Layers()
        self.layers = [self._make.prepared(layer) for layer in model.decoder.layers]
        self.final_norm = model.decoder.final_norm
        self._head = None
        head, tied = model.output_layer, model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if tied else head.weight
        if usable(weight) and head._forward_impl is fast_linear and not head.sequence_parallel:
            self._head = self._make.rows(weight.data, softcap=model.logit_softcap, wide=True)
        self._without_padding = model.without_padding

    def pack(self) -> None:
        """Copy the weights again."""
        for rows in self._make.all:
            rows.pack()

    def __call__(self, hidden_TH: torch.Tensor, segments: Segments) -> torch.Tensor:
        """-> hidden states after the final norm."""
        for layer in self.layers:
            hidden_TH = layer(hidden_TH, segments)
        return self.final_norm(hidden_TH)

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor | None:
        """Soft-capped logits, fp32 [N, vocabulary of this rank]; None if the head has to be called as it is."""
        if self._head is None or len(hidden_NH) > MOST:
            return None
        return self._without_padding(self._head(hidden_NH.contiguous()))


class _Layers:
    """Prepares layers; they share one memory."""

    def __init__(self) -> None:
        self.all: list[FewRows] = []
        self._memory = Memory()

    def rows(self, weight: torch.Tensor, **surroundings: Any) -> FewRows:
        """A linear layer (`FewRows`)."""
        self.all.append(FewRows(weight, memory=self._memory, **surroundings))
        return self.all[-1]

    def prepared(self, layer: Any) -> Layer:
        kind, parts, prepare = type(layer), None, _as_it_is
        if any(isinstance(part, Adapter) for part in layer.modules()):
            return _as_it_is(layer)
        if kind in (MambaLayer, PostNormMamba) and type(layer.mixer) is ReferenceMixer:
            parts, prepare = (layer.norm, layer.mixer.in_proj, layer.mixer.out_proj), self._mamba
        elif kind in (MLPLayer, PostNormMLP) and type(layer.mlp) is FeedForward:
            parts, prepare = (layer.pre_mlp_layernorm, layer.mlp.linear_fc1, layer.mlp.linear_fc2), self._mlp
        elif kind in (TransformerLayer, PostNormAttention) and _is_plain_attention(layer.self_attention):
            attention = layer.self_attention
            parts, prepare = (layer.input_layernorm, attention.linear_qkv, attention.linear_proj), self._attention
        return prepare(layer) if parts is None or _is_plain(*parts) else _as_it_is(layer)

    def _leave(
        self, layer: Any, last: Any, *, norm: NormWeight | None = None
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The last projection of a layer, its norm and the residual: (input of the projection, residual) -> hidden states."""
        group = last.tp_group
        if group.size() == 1:
            return self.rows(last.weight.data, norm=norm, post=_post(layer))
        product, post_norm = self.rows(last.weight.data, norm=norm), getattr(layer, "post_norm", None)

        def summed(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            out = product(x)
            dist.all_reduce(out, group=group)
            return residual + (out if post_norm is None else post_norm(out))

        return summed

    def _mamba(self, layer: Any) -> Layer:
        mixer = layer.mixer
        gated_norm = mixer.norm
        groups = gated_norm.weight.shape[0] // gated_norm.group_size
        enter = self.rows(mixer.in_proj.weight.data, norm=_norm(layer.norm))
        leave = self._leave(
            layer, mixer.out_proj, norm=NormWeight(gated_norm.weight.data, gated_norm.eps, groups=groups)
        )

        weights, sizes = mixer.scan_weights(), mixer.scan_sizes()  # views of the parameters

        def run(hidden_TH: torch.Tensor, segments: Segments) -> torch.Tensor:
            pool = segments.mamba_pools[mixer.layer_number]
            return leave(
                mamba_core_segments(enter(hidden_TH), weights, sizes=sizes, segments=segments, pool=pool), hidden_TH
            )

        return run

    def _mlp(self, layer: Any) -> Layer:
        choice = layer.mlp.config.activation_func.keywords  # of `train.model.activation.activate`
        enter = self.rows(layer.mlp.linear_fc1.weight.data, norm=_norm(layer.pre_mlp_layernorm), **choice)
        leave = self._leave(layer, layer.mlp.linear_fc2)
        return lambda hidden_TH, _segments: leave(enter(hidden_TH), hidden_TH)

    def _attention(self, layer: Any) -> Layer:
        attention = layer.self_attention
        enter = self.rows(attention.linear_qkv.weight.data, norm=_norm(layer.input_layernorm))
        leave = self._leave(layer, attention.linear_proj)
        core = attention.core_attention

        def run(hidden_TH: torch.Tensor, segments: Segments) -> torch.Tensor:
            return leave(core.few_tokens(enter(hidden_TH), segments), hidden_TH)

        return run


def _is_plain(norm: Any, first: Any, last: Any) -> bool:
    """Whether these are the reference backend's modules, without biases and with whole sequences on every tensor rank."""
    return (
        type(norm) is RMSNorm
        and usable(first.weight)
        and type(first) is ColumnParallelLinear
        and type(last) is RowParallelLinear
        and all(x._forward_impl is fast_linear and x.bias is None and not x.sequence_parallel for x in (first, last))
    )


def _is_plain_attention(attention: Any) -> bool:
    core = attention.core_attention
    return (
        type(attention) is SelfAttention
        and type(core) is AttentionCore
        and all(x is None or isinstance(x, IdentityOp) for x in (attention.q_layernorm, attention.k_layernorm))
        and compiled_attention.attention_usable(
            attention.linear_qkv.weight.new_empty(attention.hidden_size_per_attention_head)
        )
    )


def _norm(module: RMSNorm) -> NormWeight:
    return NormWeight(module.weight.data, module.eps, module.offset)


def _post(layer: Any) -> NormWeight | None:
    return _norm(layer.post_norm) if hasattr(layer, "post_norm") else None


def _as_it_is(layer: Any) -> Layer:
    def run(hidden_TH: torch.Tensor, segments: Segments) -> torch.Tensor:
        output = layer(
            hidden_states=hidden_TH[:, None], attention_mask=None, packed_seq_params=RowContext(segments=segments)
        )
        return (output[0] if isinstance(output, tuple) else output)[:, 0].contiguous()

    return run
