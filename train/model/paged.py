"""Attention over keys and values in pages, for the texts of a step of inference.

    out = softmax(cap(q k^T scale)) v    over the keys from the start of the window (or of the text) to the query's own

Shape letters: S texts, T tokens of the step, Q queries of a text, K keys, H query heads, G key/value heads, R = H / G, D width.
Arithmetic is fp32 (float64 for float64) for every storage dtype. Keys and values are read a block at a time, and sums are
rescaled when a larger score comes (FlashAttention, arXiv 2205.14135): memory does not grow with the text. The compiled version
is in `attention.c`.
"""

import torch

from train.model.context import KeyPool, Segment

BLOCK_TOKENS = 2048
"""Keys that are copied from their pages at once."""


def interleaved(query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor) -> torch.Tensor:
    """As Megatron's projection gives them: by key/value head its queries, its key, its value, [T, G * (R + 2) * D]."""
    groups = key_TGD.shape[1]
    parts = [query_THD.unflatten(1, (groups, -1)), key_TGD[:, :, None], value_TGD[:, :, None]]
    return torch.cat(parts, dim=2).flatten(1).contiguous()


def pages_of(
    pool: KeyPool, table: torch.Tensor, segment: Segment, *, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(keys [K, 1, G, D], values, index of the first of them in the text): what the segment's tokens see, the new ones last."""
    page_tokens = pool.keys.shape[1]
    end = segment.before + segment.tokens
    first_page = _first_page(segment, page_tokens, window)
    pages = table[segment.slot, first_page : -(-end // page_tokens)].long()
    first = first_page * page_tokens
    keys, values = (x[pages].flatten(0, 1)[: end - first, None] for x in (pool.keys, pool.values))
    return keys, values, first


def paged_attention(
    query_THD: torch.Tensor,
    pool: KeyPool,
    table: torch.Tensor,
    segments: list[Segment],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Each query over its keys, its own included (stored before the call). -> [T, H * D], at least fp32.

    table: `KeyPlaces.table`. The segments are those of query_THD, in order.
    """
    work = torch.promote_types(query_THD.dtype, torch.float32)
    out = torch.empty(query_THD.shape, dtype=work, device=query_THD.device)
    for segment in segments:
        tokens = slice(segment.begin, segment.begin + segment.tokens)
        part = (query_THD[tokens].to(work), pool, table, segment)
        out[tokens] = _of_a_text(*part, window=window, scale=scale, softcap=softcap)
    return out.flatten(1)


def _of_a_text(
    query_QHD: torch.Tensor,
    pool: KeyPool,
    table: torch.Tensor,
    segment: Segment,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    page_tokens, groups = pool.keys.shape[1:3]
    end = segment.before + segment.tokens
    q = query_QHD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, R, Q, D]
    own = torch.arange(segment.before, end, device=q.device)[:, None]
    top = q.new_full((*q.shape[:-1], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    step = max(1, BLOCK_TOKENS // page_tokens)
    for page in range(_first_page(segment, page_tokens, window), -(-end // page_tokens), step):
        pages = table[segment.slot, page : min(page + step, -(-end // page_tokens))].long()
        first = page * page_tokens
        k, v = (
            x[pages].flatten(0, 1)[: end - first].to(q.dtype).permute(1, 0, 2)[:, None]
            for x in (pool.keys, pool.values)
        )  # [G, 1, K, D]
        scores = q @ k.transpose(2, 3) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(first, first + k.shape[2], device=q.device)
        hidden = places > own
        if window is not None:
            hidden |= places <= own - window
        scores.masked_fill_(hidden, -torch.inf)
        before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        base = top.masked_fill(top == -torch.inf, 0)  # of a query that has not seen a key yet
        p, factor = torch.exp(scores - base), torch.exp(before - base)
        total, out = total * factor + p.sum(-1, keepdim=True), out * factor + p @ v
    return (out / total).permute(2, 0, 1, 3).flatten(1, 2)


def _first_page(segment: Segment, page_tokens: int, window: int | None) -> int:
    """The first page that the segment's first token sees."""
    return 0 if window is None else max(0, segment.before - window + 1) // page_tokens
