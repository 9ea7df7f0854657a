"""Binding of the compiled, blocked attention in `attention.c`. `train.model.capped` is the definition."""

import ctypes
from typing import Any

import torch

from train.native.kernels import call, library_for

FIELDS = "pairs lines keys width groups per_group queries offset stretches window"


class Attention(ctypes.Structure):
    """Mirror of `Attention` in attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in FIELDS.split()),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def attention_usable(query: torch.Tensor) -> bool:
    """Whether the compiled attention supports these heads [..., width]: on a CPU, not float64, width a multiple of the lanes."""
    if query.device.type != "cpu" or query.dtype == torch.float64:
        return False
    return _library(query) is not None


def _library(x: torch.Tensor) -> ctypes.CDLL | None:
    """For heads [..., width]."""
    return library_for("attention", x.shape[-1])


TASKS = 16
"""A backward pass is split into at least this many tasks, for any number of threads, so that the bits do not depend on it."""


def _attention(q: torch.Tensor, k: torch.Tensor, first_key_BQ: torch.Tensor, plan: Any) -> Attention:
    pairs, lines, width = q.shape
    queries = first_key_BQ.shape[1]
    return Attention(
        pairs=pairs, lines=lines, keys=k.shape[1], width=width, groups=plan.groups, per_group=lines // queries,
        queries=queries, offset=plan.offset, stretches=max(1, min(-(-TASKS // pairs), lines // 128)), scale=plan.scale,
        softcap=plan.softcap,
    )  # fmt: skip


def _turned(k: torch.Tensor, times: int) -> torch.Tensor:
    kernels = _library(k)
    assert kernels is not None
    block = kernels.stratum_keys()
    return torch.empty(times * k.shape[0] * -(-k.shape[1] // block) * block * k.shape[2])


def capped_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_key_BQ: torch.Tensor, plan: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [pairs, lines, D], k, v [pairs, keys, D], fp32 and contiguous. -> (out like q, sums of p [pairs, lines]).

    Without a cap (plan.softcap 0) the second is the log-sum-exp instead."""
    kernels = _library(q)
    assert kernels is not None
    out, sums = torch.empty_like(q), torch.empty(q.shape[:2])
    head = _attention(q, k, first_key_BQ, plan)
    call(kernels.stratum_capped_forward, head, q, k, v, first_key_BQ, _turned(k, 1), out, sums)
    return out, sums


def capped_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key_BQ: torch.Tensor,
    sums: torch.Tensor,
    grad: torch.Tensor,
    constant: torch.Tensor,
    plan: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad: gradient of out, divided by the sums if there is a cap; constant: <grad, out>. -> gradients of q, k, v."""
    kernels = _library(q)
    assert kernels is not None
    head = _attention(q, k, first_key_BQ, plan)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.empty(2, head.stretches, *k.shape).unbind()
    call(
        kernels.stratum_capped_backward, head, q, k, v, first_key_BQ, sums, grad, constant, _turned(k, 2), grad_q, grad_k, grad_v
    )  # fmt: skip
    return grad_q, grad_k.sum(0), grad_v.sum(0)


class Paged(ctypes.Structure):
    """Mirror of `Paged` in attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ["texts", "heads", "groups", "width", "page_tokens", "pages", "window"]),
        ("bf16", ctypes.c_int32), ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
    ]  # fmt: skip


def paged_step(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    table: torch.Tensor,
    texts_S4: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    heads: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    log_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate, store and attend for new tokens (`train.model.paged` is the definition), each a line of texts_S4: index, 1, tokens
    before it in its text, slot. -> [S, H*D] fp32. log_sums: [S, H] fp32 gets the log-sum-exp of the scores.

    qkv: [S, G * (H/G + 2) * D], by key/value head its queries, its key, its value. angles: cosines and sines by position, or None
    for no rotation. `keys` and `values`, [pages, page tokens, G, D], are updated.
    """
    head, out = _paged(qkv, heads, table, keys, window=window, scale=scale, softcap=softcap)
    kernels = _library(keys)
    assert kernels is not None
    cosine, sine = angles if angles is not None else (None, None)
    call(kernels.stratum_paged_step, head, qkv, cosine, sine, table, texts_S4, keys, values, out, log_sums)
    return out


def paged_parts(
    query_THD: torch.Tensor,
    table: torch.Tensor,
    texts_S4: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """`train.model.paged.paged_attention`. query_THD: fp32, contiguous. -> [T, H*D] fp32."""
    head, out = _paged(query_THD, query_THD.shape[1], table, keys, window=window, scale=scale, softcap=softcap)
    head.texts = len(texts_S4)
    kernels = _library(keys)
    assert kernels is not None
    call(kernels.stratum_paged_parts, head, query_THD, table, texts_S4, keys, values, out)
    return out


def _paged(
    tokens: torch.Tensor,
    heads: int,
    table: torch.Tensor,
    keys: torch.Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Paged, torch.Tensor]:
    """The kernel's first argument, with a text a token, and memory for its result."""
    _, page_tokens, groups, width = keys.shape
    head = Paged(
        texts=tokens.shape[0], heads=heads, groups=groups, width=width, page_tokens=page_tokens, pages=table.shape[1],
        window=window or 0, bf16=int(keys.dtype == torch.bfloat16), scale=scale, softcap=softcap or 0.0,
    )  # fmt: skip
    return head, torch.empty(tokens.shape[0], heads * width)
