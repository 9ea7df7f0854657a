"""Attention with caps, windows and documents through torch's FlexAttention, which fuses them into one GPU kernel (**not run
on a GPU**; mask and score functions are tested on a CPU, where torch runs them unfused, and compilations are counted).

Compiling and making block masks cost more than attention itself, so both are done once: the function is compiled once a
process and cap, again only for shapes of another kind; a mask without documents is kept for as long as it is in use, one
with documents for its microbatch (`RowContext.masks`): layers with the same window share it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from train.model.context import RowContext


@functools.cache
def fused(device_type: str) -> Callable[..., Any]:
    """FlexAttention compiled; on a CPU, where it has no gradient compiled, as it is."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


@functools.cache
def _cap(softcap: float) -> Callable[..., torch.Tensor]:
    def cap(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.lru_cache(maxsize=32)
def _interval_mask(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> BlockMask:
    """Of every row: from the start of the window, or of the row, to the query's own place."""
    span = keys if window is None else window

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q + offset) & (k > q + offset - span)

    return create_block_mask(visible, None, None, queries, keys, device=device)


def _document_mask(first_key_BQ: torch.Tensor, keys: int, offset: int) -> BlockMask:
    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q + offset) & (k >= first_key_BQ[b, q])

    rows, queries = first_key_BQ.shape
    return create_block_mask(visible, rows, None, queries, keys, device=first_key_BQ.device)


def mask_of(
    row: RowContext, *, queries: int, keys: int, offset: int, window: int | None, device: torch.device,
    first_key_BQ: Callable[[], torch.Tensor],
) -> BlockMask:  # fmt: skip
    """The mask of queries at places offset ... offset + queries - 1 among the keys. first_key_BQ: called where documents
    are apart and their mask was not made yet."""
    if row.documents is None:
        return _interval_mask(queries, keys, offset, window, device)
    key = (queries, keys, offset, window)
    if key not in row.masks:
        row.masks[key] = _document_mask(first_key_BQ(), keys, offset)
    return row.masks[key]


def flex(
    query_QBHD: torch.Tensor,
    key_KBGD: torch.Tensor,
    value_KBGD: torch.Tensor,
    *,
    mask: BlockMask,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """The contract of `train.model.capped.capped_attention`, given a mask. softcap None: no cap."""
    out_BHQD = fused(query_QBHD.device.type)(
        query_QBHD.permute(1, 2, 0, 3),
        key_KBGD.permute(1, 2, 0, 3),
        value_KBGD.permute(1, 2, 0, 3),
        score_mod=_cap(softcap) if softcap is not None else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=query_QBHD.shape[2] != key_KBGD.shape[2],
    )
    return out_BHQD.permute(2, 0, 1, 3).flatten(2)
