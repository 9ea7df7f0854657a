"""The attention core: scaled dot-product attention over grouped queries, with documents, context ranks and a cache.

Megatron's own core needs Transformer Engine for packed documents and for context parallelism; this one does both in
plain torch on any device. It stands inside Megatron's SelfAttention, which owns the projections and their sharding.

    query_SBHD, key_SBGD, value_SBGD --> output_SB(HD)      S sequence, B rows, H query heads, G key/value heads, D width

Context parallelism: context rank r of c holds chunks r and 2c-1-r of 2c equal chunks of the row (the order Megatron's
Mamba all-to-all assumes, balanced for causal masks). Keys and values are gathered over the group; the gather's backward
is the matching reduce-scatter. Masks go by true positions, so nothing needs reordering.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from train.model.context import LayerCaches, RowContext


def zigzag_positions(sequence: int, *, rank: int, ranks: int, device: torch.device) -> torch.Tensor:
    """True positions of the tokens context rank `rank` holds, [sequence / ranks], for a row of `sequence` tokens."""
    if ranks == 1:
        return torch.arange(sequence, device=device)
    chunk = sequence // (2 * ranks)
    starts = (rank * chunk, (2 * ranks - 1 - rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])


class AttentionCore(MegatronModule):
    """Causal attention through torch's scaled_dot_product_attention; fp32 arithmetic on a CPU whatever the storage."""

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
        assert attn_mask_type == AttnMaskType.causal, "language models here are causal"
        assert pg_collection is not None, "process groups are handed in"
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: RowContext | None = None,
    ) -> torch.Tensor:
        """See the module text for shapes. Collective over the context group where that has more than one rank."""
        caches = packed_seq_params.caches if packed_seq_params is not None else None
        documents = packed_seq_params.documents if packed_seq_params is not None else None
        if caches is not None:
            key_SBGD, value_SBGD = self._extend_cache(caches, key_SBGD, value_SBGD)
        ranks = self.context_group.size()
        if ranks > 1:
            key_SBGD = gather_from_sequence_parallel_region(key_SBGD, group=self.context_group)
            value_SBGD = gather_from_sequence_parallel_region(value_SBGD, group=self.context_group)
        mask = self._mask(query_SBHD, key_SBGD, documents=documents, caches=caches)

        storage = query_SBHD.dtype
        if query_SBHD.device.type == "cpu" and storage == torch.bfloat16:
            query_SBHD, key_SBGD, value_SBGD = query_SBHD.float(), key_SBGD.float(), value_SBGD.float()
        out_BHSD = F.scaled_dot_product_attention(
            query_SBHD.permute(1, 2, 0, 3),
            key_SBGD.permute(1, 2, 0, 3),
            value_SBGD.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None and query_SBHD.shape[0] > 1,
            scale=self.softmax_scale,
            enable_gqa=query_SBHD.shape[2] != key_SBGD.shape[2],
        )
        return out_BHSD.permute(2, 0, 1, 3).flatten(2).to(storage)

    def _mask(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        *,
        documents: torch.Tensor | None,
        caches: LayerCaches | None,
    ) -> torch.Tensor | None:
        """Which keys a query may see: bool, broadcast to [rows, heads, queries, keys]; None means plain causal."""
        ranks = self.context_group.size()
        keys, queries, device = key_SBGD.shape[0], query_SBHD.shape[0], query_SBHD.device
        if caches is not None:
            if queries == 1 or keys == queries:
                return None  # one new token sees everything before it; a first prompt is plain causal
            key_positions = torch.arange(keys, device=device)
            return key_positions[None, :] <= key_positions[keys - queries :, None]
        if ranks == 1 and documents is None:
            return None
        query_positions = zigzag_positions(keys, rank=self.context_group.rank(), ranks=ranks, device=device)
        key_positions = torch.cat([zigzag_positions(keys, rank=r, ranks=ranks, device=device) for r in range(ranks)])
        mask = key_positions[None, :] <= query_positions[:, None]
        if documents is None:
            return mask
        same = documents[:, query_positions][:, :, None] == documents[:, key_positions][:, None, :]
        return (mask & same)[:, None]

    def _extend_cache(
        self, caches: LayerCaches, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layer_number in caches.keys_values:
            past_key, past_value = caches.keys_values[self.layer_number]
            key_SBGD = torch.cat([past_key, key_SBGD])
            value_SBGD = torch.cat([past_value, value_SBGD])
        caches.keys_values[self.layer_number] = (key_SBGD, value_SBGD)
        return key_SBGD, value_SBGD
