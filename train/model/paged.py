"""Attention over keys and values in pages: one query a text, for the texts of a step of inference that have one new token.

    out = softmax(cap(q k^T scale)) v    over the keys from the start of the window (or of the text) to the query's own

Shape letters: S texts, K keys, H query heads, G key/value heads, R = H / G, D width. Arithmetic is fp32 (float64 for float64)
for every storage dtype. The compiled version (`attention.c`) reads the pages where they are; this definition copies them.
"""

import torch

from train.model.context import KeyPool, Segment


def pages_of(
    pool: KeyPool, table: torch.Tensor, segment: Segment, *, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(keys [K, 1, G, D], values, index of the first of them in the text): what the segment's tokens see, the new ones last."""
    page_tokens = pool.keys.shape[1]
    end = segment.before + segment.tokens
    first_page = 0 if window is None else max(0, segment.before - window + 1) // page_tokens
    pages = table[segment.slot, first_page : -(-end // page_tokens)].long()
    first = first_page * page_tokens
    keys, values = (x[pages].flatten(0, 1)[: end - first, None] for x in (pool.keys, pool.values))
    return keys, values, first


def paged_attention(
    query_SHD: torch.Tensor,
    pool: KeyPool,
    table: torch.Tensor,
    segments_S4: torch.Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """The one query of each text over its keys, its own included (stored before the call). -> [S, H * D], at least fp32.

    table: `KeyPlaces.table`; segments_S4: lines of `Segments.table`.
    """
    work = torch.promote_types(query_SHD.dtype, torch.float32)
    groups = pool.keys.shape[2]
    out = torch.empty(query_SHD.shape, dtype=work, device=query_SHD.device)
    for line, (begin, tokens, before, slot) in enumerate(segments_S4.tolist()):
        keys, values, first = pages_of(pool, table, Segment(begin, tokens, before, slot), window=window)
        skip = 0 if window is None else max(0, before - window + 1) - first
        k, v = (x[skip:, 0].to(work).permute(1, 0, 2) for x in (keys, values))  # [G, K, D]
        scores = query_SHD[line].to(work).unflatten(0, (groups, -1)) @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[line] = (torch.softmax(scores, dim=-1) @ v).flatten(0, 1)
    return out.flatten(1)
