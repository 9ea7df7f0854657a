"""The transformer that both encoders share: Megatron's layers over segments of different lengths, packed without padding.

    x_T1H, lengths --PackedEncoder--> features_T1H            T tokens of all segments, one after the other

A segment is an image, a frame of a video, or a clip. Attention sees the whole of its own segment in both directions. The linear
layers are split over tensor ranks; norms and biases of row-parallel layers are the same on all of them. Encoders are not split
over pipeline or context ranks, and their sequence is not split over tensor ranks: each has all tokens of its microbatch.

Linear layers compute in the storage precision: `precision` quantises the language model only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn
from torch.nn import functional as F

from recipes.schema.encoders import EncoderConfig
from train.model.linear import use_fast_product


@dataclass
class Segments(PackedSeqParams):
    """Lengths of the packed segments. Megatron passes it to every attention layer."""

    qkv_format: str = "sbhd"
    lengths: tuple[int, ...] = ()
    places: list[torch.Tensor] = field(default_factory=list)
    """For each different length n, [segments of that length, n] int64: indices of their tokens."""

    @staticmethod
    def of(lengths: list[int], *, device: torch.device) -> "Segments":
        """Segments of these lengths, in order."""
        by_length: dict[int, list[int]] = {}
        begin = 0
        for length in lengths:
            by_length.setdefault(length, []).append(begin)
            begin += length
        places = [
            torch.tensor(begins, device=device)[:, None] + torch.arange(length, device=device)
            for length, begins in by_length.items()
        ]
        return Segments(lengths=tuple(lengths), places=places)


class SegmentAttention(MegatronModule):
    """Attention in both directions within each segment; segments of one length are computed together."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.no_mask, "encoders see both directions"

    def forward(
        self,
        query_T1HD: torch.Tensor,
        key_T1HD: torch.Tensor,
        value_T1HD: torch.Tensor,
        attention_mask: None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: Segments | None = None,
    ) -> torch.Tensor:
        """-> [T, 1, H * D]"""
        assert packed_seq_params is not None, "encoders need the lengths of their segments"
        outputs = []
        for places_NL in packed_seq_params.places:
            parts = (x[:, 0][places_NL].transpose(1, 2) for x in (query_T1HD, key_T1HD, value_T1HD))
            outputs.append(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2).flatten(0, 1))
        places_T = torch.cat([places_NL.flatten() for places_NL in packed_seq_params.places])
        together = torch.cat(outputs)
        return together[places_T.argsort()][:, None]


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, built as Megatron's specs build norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())


def encoder_config(
    encoder: EncoderConfig, *, decoder: TransformerConfig, activation: Callable[[torch.Tensor], torch.Tensor]
) -> TransformerConfig:
    """Megatron's configuration of an encoder next to a language model of configuration `decoder`."""
    return TransformerConfig(
        num_layers=encoder.layers,
        hidden_size=encoder.hidden,
        ffn_hidden_size=encoder.ffn,
        num_attention_heads=encoder.heads,
        normalization="LayerNorm",
        layernorm_epsilon=encoder.norm_eps,
        add_bias_linear=True,
        add_qkv_bias=True,
        activation_func=activation,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=decoder.params_dtype,
        bf16=decoder.bf16,
        pipeline_dtype=decoder.pipeline_dtype,
        perform_initialization=False,
        tensor_model_parallel_size=decoder.tensor_model_parallel_size,
        # The same fields as the language model's: docs/megatron.md says why.
        recompute_granularity=decoder.recompute_granularity,
        recompute_method=decoder.recompute_method,
        recompute_num_layers=decoder.recompute_num_layers,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # Each layer has names of its own in checkpoints, like the language model's.
        hetereogenous_dist_checkpoint=True,
    )


def _layer() -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=SegmentAttention, linear_proj=RowParallelLinear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class PackedEncoder(TransformerBlock):
    """Pre-norm transformer layers and a last LayerNorm."""

    def __init__(self, config: TransformerConfig, *, groups: ProcessGroupCollection) -> None:
        specs = TransformerBlockSubmodules(layer_specs=[_layer()] * config.num_layers, layer_norm=LayerNorm)
        super().__init__(config=config, spec=specs, pg_collection=groups)
        use_fast_product(self)

    def forward(self, x_T1H: torch.Tensor, segments: Segments, **_: Any) -> torch.Tensor:
        """x: [tokens of all segments, 1, width] -> the same shape. Collective over the tensor group."""
        return super().forward(hidden_states=x_T1H, attention_mask=None, packed_seq_params=segments)
