"""Blocked attention on a CPU: scores are computed, capped and used one block at a time; [S, S] scores never exist.

    p = exp(c tanh(q k^T scale / c))  for first_key <= key <= the query's own index     out = (p v) / (sum of p)

The cap bounds every score by c, so there is no need to subtract the largest score before the exponential (exp(70) x 10^6
keys fits fp32): sums over blocks of keys simply add up. The backward pass computes p again from the saved sums, as
FlashAttention does (arXiv 2205.14135). Masks are intervals (causal, window, document), so blocks of keys outside a query's
interval are skipped. The compiled version (`attention.c`) also supports attention without a cap.

Shape letters: Q queries, K keys, B rows, H query heads, G key/value heads, R = H / G, D width. The first query is key
number `offset`. Arithmetic is fp32 (float64 for float64 inputs) for every storage dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from train.model.context import PAGE_TOKENS, DocumentPages
from train.model.paged import interleaved
from train.native import attention as compiled

LARGEST_CAP = 70.0
"""exp(70) = 2.5e30; fp32 overflows at 3.4e38, so sums over up to 10^8 keys are finite."""
QUERIES, KEYS = 128, 512
"""Block sizes in tokens: a block of scores of one key/value head stays in the cache."""
BLOCK_SCORES = 1 << 19
"""Scores computed at once, over all rows and heads together."""


@dataclass(frozen=True)
class _Plan:
    """The arguments other than tensors that forward and backward share."""

    groups: int
    offset: int
    """Index of the first query among the keys."""
    scale: float
    softcap: float
    """0: no cap."""


def stepwise_attention(
    query_SBHD: torch.Tensor,
    key_SBGD: torch.Tensor,
    value_SBGD: torch.Tensor,
    *,
    places: DocumentPages,
    first_key_BQ: torch.Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """`capped_attention` of whole rows whose forward pass is that of a step of inference, bit by bit: each token is a text of
    its own with the keys before it. Only if `compiled.attention_usable`. window: that of first_key_BQ."""
    plan = _Plan(groups=key_SBGD.shape[2], offset=0, scale=scale, softcap=softcap or 0.0)
    steps = _Steps(places, window)
    return _Capped.apply(query_SBHD, key_SBGD, value_SBGD, first_key_BQ.contiguous(), plan, steps)


@dataclass(frozen=True)
class _Steps:
    """What the kernel of a step of inference needs in addition."""

    places: DocumentPages
    window: int | None


def capped_attention(
    query_QBHD: torch.Tensor,
    key_KBGD: torch.Tensor,
    value_KBGD: torch.Tensor,
    *,
    first_key_BQ: torch.Tensor,
    offset: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of queries offset ... offset + Q - 1 (indices among the keys), each from its first key to its own index.

    first_key_BQ: int32, never decreasing along Q. softcap None: no cap, only if `compiled.attention_usable`.
    -> [Q, B, H * D]. Deterministic. Differentiable once.
    """
    assert softcap is None or softcap <= LARGEST_CAP, f"exponentials of scores up to {softcap} overflow"
    assert softcap is not None or compiled.attention_usable(query_QBHD), "use torch's attention without a cap"
    plan = _Plan(groups=key_KBGD.shape[2], offset=offset, scale=scale, softcap=softcap or 0.0)
    return _Capped.apply(query_QBHD, key_KBGD, value_KBGD, first_key_BQ.contiguous(), plan, None)


@dataclass(frozen=True)
class _Block:
    """A block of scores. pairs: (row, key/value head) pairs, flattened."""

    pairs: slice
    queries: slice
    keys: slice


def _blocks(first_key_BQ: torch.Tensor, plan: _Plan, *, heads_per_group: int) -> Iterator[list[_Block]]:
    """All blocks in which some query sees some key; the blocks of one list share their queries."""
    rows, queries = first_key_BQ.shape
    pairs = rows * plan.groups
    lowest = first_key_BQ.min(dim=0).values.tolist()
    for start in range(0, queries, QUERIES):
        end = min(start + QUERIES, queries)
        first, last = lowest[start], plan.offset + end
        width = min(KEYS, last - first)
        together = max(1, BLOCK_SCORES // (heads_per_group * (end - start) * width))
        for pair in range(0, pairs, together):
            yield [
                _Block(
                    pairs=slice(pair, min(pair + together, pairs)),
                    queries=slice(start, end),
                    keys=slice(key, min(key + KEYS, last)),
                )
                for key in range(first, last, KEYS)
            ]


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        first_key_BQ: torch.Tensor,
        plan: _Plan,
        steps: _Steps | None,
    ) -> torch.Tensor:
        q, k, v = _by_pair(query, plan.groups), _by_pair(key, plan.groups), _by_pair(value, plan.groups)
        if steps is not None:
            out, sums = _forward_by_steps(query, key, value, plan, steps)
        elif compiled.attention_usable(query):
            out, sums = compiled.capped_forward(q, k, v, first_key_BQ, plan)
        else:
            out, sums = _forward(q, k, v, first_key_BQ, plan)
        ctx.save_for_backward(query, key, value, first_key_BQ, out, sums)
        ctx.plan = plan
        return _by_token(out, query).flatten(2).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, first_key_BQ, out, sums = ctx.saved_tensors
        plan: _Plan = ctx.plan
        q, k, v = _by_pair(query, plan.groups), _by_pair(key, plan.groups), _by_pair(value, plan.groups)
        grad = _by_pair(grad_out.view(query.shape), plan.groups)
        # Gradient of p: (grad v^T - <grad, out>) / sum. The second term is the same for all keys of a query.
        if plan.softcap:
            grad = grad / sums.unsqueeze(-1)
        constant = (grad * out).sum(-1)
        if compiled.attention_usable(query):
            grad_q, grad_k, grad_v = compiled.capped_backward(q, k, v, first_key_BQ, sums, grad, constant, plan)
        else:
            grad_q, grad_k, grad_v = _backward(q, k, v, first_key_BQ, grad, constant, plan)
        return (
            _by_token(grad_q, query).to(query.dtype),
            _by_token(grad_k, key).to(key.dtype),
            _by_token(grad_v, value).to(value.dtype),
            None,
            None,
            None,
        )


def _forward_by_steps(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: _Plan, steps: _Steps
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [S, B, H, D], key, value [S, B, G, D] -> as `_forward`; the second is the log-sum-exp without a cap."""
    sequence, rows, heads, width = query.shape
    places, tokens = steps.places, sequence * rows
    log_sums = torch.empty(tokens, heads)
    keys, values = torch.empty(2, places.pages, PAGE_TOKENS, plan.groups, width).unbind()
    out = compiled.paged_step(
        interleaved(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)), None, places.table, places.lines_T4,
        keys, values, heads=heads, window=steps.window, scale=plan.scale, softcap=plan.softcap or None, log_sums=log_sums,
    )  # fmt: skip
    sums = _by_pair(log_sums.view(sequence, rows, heads, 1), plan.groups).squeeze(-1)
    return _by_pair(out.view(query.shape), plan.groups), sums.exp_() if plan.softcap else sums


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_key_BQ: torch.Tensor, plan: _Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [pairs, lines, D], k, v [pairs, keys, D] -> (out like q, sums of p [pairs, lines])."""
    per_group = q.shape[1] // first_key_BQ.shape[1]
    out = torch.empty_like(q)
    sums = torch.zeros(q.shape[:2], dtype=q.dtype, device=q.device)
    for blocks in _blocks(first_key_BQ, plan, heads_per_group=per_group):
        where = (blocks[0].pairs, _lines(blocks[0].queries, per_group))
        for index, block in enumerate(blocks):
            p = torch.bmm(q[where], k[block.pairs, block.keys].transpose(1, 2))
            _exponentials_(p, sums[where], first_key_BQ, block, plan)
            values = v[block.pairs, block.keys]
            out[where].baddbmm_(p, values, beta=min(index, 1))
    out /= sums.unsqueeze(-1)
    return out, sums


def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key_BQ: torch.Tensor,
    grad: torch.Tensor,
    constant: torch.Tensor,
    plan: _Plan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad: of out, divided by the sums; constant: <grad, out>. -> gradients of q, k, v."""
    per_group = q.shape[1] // first_key_BQ.shape[1]
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for blocks in _blocks(first_key_BQ, plan, heads_per_group=per_group):
        where = (blocks[0].pairs, _lines(blocks[0].queries, per_group))
        for index, block in enumerate(blocks):
            at = (block.pairs, block.keys)
            scores = torch.bmm(q[where], k[at].transpose(1, 2))
            grad_p = torch.bmm(grad[where], v[at].transpose(1, 2))
            p = _gradients_(scores, grad_p, constant[where], first_key_BQ, block, plan)
            grad_v[at].baddbmm_(p.transpose(1, 2), grad[where])
            grad_q[where].baddbmm_(grad_p, k[at], beta=min(index, 1))
            grad_k[at].baddbmm_(grad_p.transpose(1, 2), q[where])
    return grad_q, grad_k, grad_v


def _by_pair(x_SBHD: torch.Tensor, groups: int) -> torch.Tensor:
    """[S, B, H, D] -> [B * G, S * R, D] contiguous: one matrix per row and key/value head; its lines are (token, query head)."""
    sequence, rows, heads, width = x_SBHD.shape
    work = torch.promote_types(x_SBHD.dtype, torch.float32)
    by_group = x_SBHD.to(work).view(sequence, rows, groups, heads // groups, width)
    return by_group.permute(1, 2, 0, 3, 4).reshape(rows * groups, -1, width).contiguous()


def _by_token(x: torch.Tensor, like_SBHD: torch.Tensor) -> torch.Tensor:
    """Inverse of `_by_pair`: [S, B, H, D]."""
    sequence, rows, heads, width = like_SBHD.shape
    return x.view(rows, -1, sequence, heads * rows // x.shape[0], width).permute(2, 0, 1, 3, 4).reshape(like_SBHD.shape)


def _lines(queries: slice, per_group: int) -> slice:
    """The lines of `_by_pair` that belong to a slice of queries."""
    return slice(queries.start * per_group, queries.stop * per_group)


def _hidden(first_key_BQ: torch.Tensor, block: _Block, plan: _Plan, lines: int) -> torch.Tensor | None:
    """True where a query must not see a key, [pairs, lines, keys]; None if every query of the block sees every key."""
    first = first_key_BQ[:, block.queries]
    if block.keys.stop <= plan.offset + block.queries.start + 1 and int(first.max()) <= block.keys.start:
        return None
    device = first.device
    keys = torch.arange(block.keys.start, block.keys.stop, device=device)
    own = torch.arange(block.queries.start, block.queries.stop, device=device) + plan.offset
    hidden = (keys > own[:, None]) | (keys < first[:, :, None])  # [B, Q, K]
    per_pair = hidden.repeat_interleave(plan.groups, dim=0)[block.pairs]
    return per_pair.repeat_interleave(lines // own.shape[0], dim=1)


def _exponentials_(
    scores: torch.Tensor, sums: torch.Tensor, first_key_BQ: torch.Tensor, block: _Block, plan: _Plan
) -> None:
    """q k^T -> p in place, 0 where hidden. Adds the sums of p over the keys to `sums`."""
    scores.mul_(plan.scale / plan.softcap).tanh_().mul_(plan.softcap).exp_()
    hidden = _hidden(first_key_BQ, block, plan, scores.shape[1])
    if hidden is not None:
        scores.masked_fill_(hidden, 0)
    sums += scores.sum(-1)


def _gradients_(
    scores: torch.Tensor,
    grad_p: torch.Tensor,
    constant: torch.Tensor,
    first_key_BQ: torch.Tensor,
    block: _Block,
    plan: _Plan,
) -> torch.Tensor:
    """In place: scores (q k^T) become p, which is returned; grad_p becomes the gradient of q k^T."""
    t = scores.mul_(plan.scale / plan.softcap).tanh_()
    slope = torch.addcmul(torch.full((), plan.scale, dtype=t.dtype, device=t.device), t, t, value=-plan.scale)
    p = t.mul_(plan.softcap).exp_()
    hidden = _hidden(first_key_BQ, block, plan, scores.shape[1])
    if hidden is not None:
        p.masked_fill_(hidden, 0)
    grad_p.sub_(constant.unsqueeze(-1)).mul_(p).mul_(slope)
    return p
