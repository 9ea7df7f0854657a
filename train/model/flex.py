"""Attention with soft caps, windows and documents by torch's FlexAttention, which fuses them into one GPU kernel (**not run
on a GPU**; tests run mask and score functions on a CPU, where torch does not fuse them, and count compilations).

Compilation and block masks cost more than attention itself, so both are reused. The function is compiled once per process
and cap, and again for new kinds of shapes. Masks without documents are cached per shape; masks with documents are cached
for one microbatch (`RowContext.masks`). Layers with the same window share a mask.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from train.model.context import RowContext


@functools.cache
def fused(device_type: str) -> Callable[..., Any]:
    """FlexAttention: compiled on a GPU; not on a CPU, where the compiled one has no gradient."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


@functools.cache
def _cap(softcap: float) -> Callable[..., torch.Tensor]:
    def cap(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.lru_cache(maxsize=32)
def _interval_mask(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> BlockMask:
    """The same for all rows: keys from the start of the window (None: of the row) to the query's own index."""
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
    """The mask of queries offset ... offset + queries - 1 (indices among the keys). first_key_BQ: called only if the row has
    documents and their mask is not cached yet."""
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
    """Shapes as in `train.model.capped.capped_attention`; the mask replaces first keys and offset. softcap None: no cap."""
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
