"""The attention core: scaled dot-product attention over grouped queries, with rotary positions, a window, a soft cap,
document boundaries, context parallelism, and pages of keys and values during inference.

Megatron's own core needs Transformer Engine for packed documents and for context parallelism, and has no soft cap; this
one supports all of them on any device. It is part of Megatron's SelfAttention, which owns the projections and their sharding.

    query_SBHD, key_SBGD, value_SBGD --rotate--> scores --cap--> mask --> softmax --> output_SB(HD)

    S sequence, B rows, H query heads, G key/value heads, D width

Each query sees one interval of keys: from its first key (start of its window or of its document, the later one) to its own
position. Context parallelism: context rank r of c holds chunks r and 2c-1-r of 2c equal chunks of the row (the order that
Megatron's Mamba all-to-all assumes; it balances causal masks). Keys and values are gathered over the group and sorted into
the order of the row; the backward pass of the gather is the matching reduce-scatter.

Implementations. CPU: `train.model.capped`, or torch's scaled_dot_product_attention if there is no soft cap and either few
queries or no compiler. GPU: torch's scaled_dot_product_attention (FlashAttention), or torch's FlexAttention
(`train.model.flex`) for soft caps, windows and documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn import functional as F

from train.model.capped import capped_attention, stepwise_attention
from train.model.context import RowContext, Segments
from train.model.documents import document_starts
from train.model.flex import flex, mask_of
from train.model.paged import interleaved, paged_attention, pages_of
from train.model.rotary import Rotary
from train.native import attention as compiled

BLOCKED_QUERIES = 16
"""Without a soft cap, blocked attention is used from this many queries on: it first transposes all keys, which does not
pay for fewer."""


def zigzag_positions(sequence: int, *, rank: int, ranks: int, device: torch.device) -> torch.Tensor:
    """Positions in the row of the tokens on context rank `rank`, [sequence / ranks], for a row of `sequence` tokens."""
    if ranks == 1:
        return torch.arange(sequence, device=device)
    chunk = sequence // (2 * ranks)
    starts = (rank * chunk, (2 * ranks - 1 - rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])


@dataclass(frozen=True)
class QueryRange:
    """Queries that are neighbours in the row."""

    queries: slice
    """Indices among this rank's queries."""
    offset: int
    """Index of the first query among the keys."""


class AttentionCore(MegatronModule):
    """Causal attention. On a CPU the arithmetic is fp32 for every storage dtype.

    softcap, rotary: the same for all layers (bound by `train.model.build`). The window comes from Megatron's config.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        softcap: float | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, "language models here are causal"
        assert pg_collection is not None, "AttentionCore needs pg_collection"
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp
        self.softcap = softcap
        self.rotary = rotary
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window_tokens = config.window_size[0] + 1 if has_window else None

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
        """Shapes: see the module docstring. Collective over the context group if it has more than one rank."""
        row = packed_seq_params if packed_seq_params is not None else RowContext()
        ranks, here = self.context_group.size(), self.context_group.rank()
        if row.segments is not None:
            return self._continue(query_SBHD, key_SBGD, value_SBGD, row.segments)
        queries, storage = query_SBHD.shape[0], query_SBHD.dtype
        sequence = queries * ranks
        if self.rotary is not None:
            positions = None
            if ranks > 1:
                positions = zigzag_positions(sequence, rank=here, ranks=ranks, device=query_SBHD.device)
            query_SBHD = self.rotary(query_SBHD, positions, length=sequence)
            key_SBGD = self.rotary(key_SBGD, positions, length=sequence)
        if ranks > 1:
            key_SBGD, value_SBGD = self._gathered(key_SBGD), self._gathered(value_SBGD)
        query_SBHD, key_SBGD, value_SBGD = _computed(query_SBHD), _computed(key_SBGD), _computed(value_SBGD)
        if row.is_stepwise and ranks == 1 and compiled.attention_usable(query_SBHD):
            first = self._first_keys(queries, 0, row, rows=query_SBHD.shape[1], device=query_SBHD.device)
            assert first is not None, "rows have documents"
            return stepwise_attention(
                query_SBHD, key_SBGD, value_SBGD, places=row.document_pages, first_key_BQ=first,
                window=self.window_tokens, scale=self._scale(query_SBHD), softcap=self.softcap,
            ).to(storage)  # fmt: skip
        keys = key_SBGD.shape[0]
        outputs = []
        for part in _query_ranges(queries, keys, rank=here, ranks=ranks):
            q = query_SBHD[part.queries]
            outputs.append(self._attend(q, key_SBGD, value_SBGD, row, offset=part.offset))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.to(storage)

    def _continue(
        self, query_T1HD: torch.Tensor, key_T1GD: torch.Tensor, value_T1GD: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """Attention of the texts of a step of inference, each over its own keys, which are stored. -> [T, 1, H*D]."""
        assert self.context_group.size() == 1, "inference splits no text over context ranks"
        if self.rotary is not None:
            positions, longest = segments.positions_T, segments.longest
            query_T1HD = self.rotary(query_T1HD, positions, length=longest)
            key_T1GD = self.rotary(key_T1GD, positions, length=longest)
        pool = segments.key_pools[self.layer_number]
        places = segments.keys["*" if self.window_tokens is None else "w"]
        if segments.is_stepwise and compiled.attention_usable(query_T1HD):
            output = compiled.paged_step(
                interleaved(query_T1HD[:, 0], key_T1GD[:, 0], value_T1GD[:, 0]), None, places.table, segments.by_token,
                pool.keys, pool.values, heads=query_T1HD.shape[2], window=self.window_tokens,
                scale=self._scale(query_T1HD), softcap=self.softcap,
            )  # fmt: skip
            return output[:, None].to(query_T1HD.dtype)
        new_T = places.places(segments.positions_T, segments.by_token[:, 3])
        pool.keys.flatten(0, 1).index_copy_(0, new_T, key_T1GD[:, 0])
        pool.values.flatten(0, 1).index_copy_(0, new_T, value_T1GD[:, 0])
        query_THD, scale = query_T1HD[:, 0], self._scale(query_T1HD)
        if compiled.attention_usable(query_THD):
            output = compiled.paged_parts(
                query_THD.float().contiguous(), places.table, segments.table, pool.keys, pool.values,
                window=self.window_tokens, scale=scale, softcap=self.softcap,
            )  # fmt: skip
            return output[:, None].to(query_T1HD.dtype)
        on_cpu = query_THD.device.type == "cpu"
        together = segments.segments if on_cpu else segments.segments[: segments.singles]
        outputs = [
            paged_attention(
                query_THD[: sum(s.tokens for s in together)], pool, places.table, together,
                window=self.window_tokens, scale=scale, softcap=self.softcap,
            )[:, None]
        ]  # fmt: skip
        for segment in segments.segments[len(together) :]:  # torch's kernels for GPUs need whole keys and values
            new = slice(segment.begin, segment.begin + segment.tokens)
            key, value, first = key_T1GD[new], value_T1GD[new], segment.before
            if segment.before:
                key, value, first = pages_of(pool, places.table, segment, window=self.window_tokens)
            outputs.append(self._attend(query_T1HD[new], key, value, RowContext(), offset=segment.before - first))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.to(query_T1HD.dtype)

    def few_tokens(self, qkv_TE: torch.Tensor, segments: Segments) -> torch.Tensor:
        """`_continue` for a step with few tokens, from the output of the projection, compiled. -> [T, H*D]."""
        pool = segments.key_pools[self.layer_number]
        places = segments.keys["*" if self.window_tokens is None else "w"]
        angles = self.rotary.angles_up_to(segments.longest, qkv_TE.device) if self.rotary is not None else None
        width, groups = pool.keys.shape[-1], pool.keys.shape[-2]
        scale = self.softmax_scale if self.softmax_scale is not None else width**-0.5
        output = compiled.paged_step(
            qkv_TE, angles, places.table, segments.by_token, pool.keys, pool.values,
            heads=qkv_TE.shape[1] // width - 2 * groups, window=self.window_tokens, scale=scale, softcap=self.softcap,
        )  # fmt: skip
        return output.to(qkv_TE.dtype)

    def _scale(self, query: torch.Tensor) -> float:
        return self.softmax_scale if self.softmax_scale is not None else query.shape[-1] ** -0.5

    def _attend(
        self,
        query_QBHD: torch.Tensor,
        key_KBGD: torch.Tensor,
        value_KBGD: torch.Tensor,
        row: RowContext,
        *,
        offset: int,
    ) -> torch.Tensor:
        """Attention of neighbouring queries, each from its first key to its own position."""
        queries, rows, device = query_QBHD.shape[0], query_QBHD.shape[1], query_QBHD.device
        keys, scale = key_KBGD.shape[0], self._scale(query_QBHD)

        def first_keys() -> torch.Tensor | None:
            return self._first_keys(queries, offset, row, rows=rows, device=device)

        def first_keys_or_zeros() -> torch.Tensor:
            first = first_keys()
            return first if first is not None else torch.zeros(rows, queries, dtype=torch.int32, device=device)

        on_cpu = device.type == "cpu"
        is_whole = row.documents is None and (self.window_tokens is None or offset + queries <= self.window_tokens)
        is_blocked = on_cpu and (
            self.softcap is not None or (queries >= BLOCKED_QUERIES and compiled.attention_usable(query_QBHD))
        )
        if self.softcap is None and not is_blocked and (on_cpu or is_whole):
            return _plain(query_QBHD, key_KBGD, value_KBGD, first_keys(), offset=offset, scale=scale)
        if is_blocked:
            return capped_attention(
                query_QBHD, key_KBGD, value_KBGD,
                first_key_BQ=first_keys_or_zeros(), offset=offset, scale=scale, softcap=self.softcap,
            )  # fmt: skip
        mask = mask_of(
            row, queries=queries, keys=keys, offset=offset, window=self.window_tokens, device=device,
            first_key_BQ=first_keys_or_zeros,
        )  # fmt: skip
        return flex(query_QBHD, key_KBGD, value_KBGD, mask=mask, scale=scale, softcap=self.softcap)

    def _first_keys(
        self, queries: int, offset: int, row: RowContext, *, rows: int, device: torch.device
    ) -> torch.Tensor | None:
        """First key each query sees, [rows, queries] int32; None if every query starts at key 0."""
        window = self.window_tokens
        if row.documents is None and (window is None or offset + queries <= window):
            return None
        places = torch.arange(offset, offset + queries, device=device)
        first = (places - (window - 1)).clamp(min=0) if window is not None else torch.zeros_like(places)
        if row.documents is None:
            return first.to(torch.int32).expand(rows, -1)
        starts = document_starts(row.documents)[:, offset : offset + queries]
        return torch.maximum(first, starts).to(torch.int32)

    def _gathered(self, part_SBGD: torch.Tensor) -> torch.Tensor:
        """Keys or values of all context ranks in the order of the row. Collective."""
        ranks = self.context_group.size()
        by_rank = gather_from_sequence_parallel_region(part_SBGD, group=self.context_group)
        chunks = by_rank.chunk(2 * ranks)  # rank r's two chunks are at 2r and 2r + 1
        return torch.cat([*chunks[0::2], *chunks[:0:-2]])  # first chunks rank 0 upwards, second ones downwards


def _computed(x: torch.Tensor) -> torch.Tensor:
    """In the format of the arithmetic: fp32 for bf16 on a CPU."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def _query_ranges(queries: int, keys: int, *, rank: int, ranks: int) -> Iterator[QueryRange]:
    """This rank's queries as ranges of neighbours: one range, or its two chunks of the row under context parallelism."""
    if ranks == 1:
        yield QueryRange(slice(0, queries), keys - queries)
        return
    chunk = queries // 2
    yield QueryRange(slice(0, chunk), rank * chunk)
    yield QueryRange(slice(chunk, queries), (2 * ranks - 1 - rank) * chunk)


def _plain(
    query_QBHD: torch.Tensor,
    key_KBGD: torch.Tensor,
    value_KBGD: torch.Tensor,
    first_BQ: torch.Tensor | None,
    *,
    offset: int,
    scale: float,
) -> torch.Tensor:
    """torch's attention, without a soft cap: with `is_causal` if that is enough, else with a mask. -> [Q, B, H * D]."""
    queries = query_QBHD.shape[0]
    key_KBGD, value_KBGD = key_KBGD[: offset + queries], value_KBGD[: offset + queries]
    mask = None
    # torch's is_causal aligns the first query with the first key, so an offset needs a mask.
    if first_BQ is not None or (offset > 0 and queries > 1):
        keys = torch.arange(offset + queries, device=query_QBHD.device)
        mask = keys <= keys[offset:, None]
        if first_BQ is not None:
            mask = (mask & (keys >= first_BQ[:, :, None]))[:, None]
    out_BHQD = F.scaled_dot_product_attention(
        query_QBHD.permute(1, 2, 0, 3),
        key_KBGD.permute(1, 2, 0, 3),
        value_KBGD.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=mask is None and queries > 1,
        scale=scale,
        enable_gqa=query_QBHD.shape[2] != key_KBGD.shape[2],
    )
    return out_BHQD.permute(2, 0, 1, 3).flatten(2)
