"""Rows of tensors sent between ranks in unequal numbers, differentiable: the collectives of expert parallelism.

    exchange_rows    rank r's j-th part goes to rank j; received parts in the order of ranks     (backward: the way back)
    gather_rows      every rank's rows, in the order of ranks                                    (backward: sum of the copies)
    scatter_rows     sum over the ranks of each rank's rows                                      (backward: gather)

gloo has no gather and no scatter of unequal parts, so those two pad every part to the largest. All are collective over their
group, in forward and in backward, also on ranks that send nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _exchanged(grad, ctx.receive, ctx.send, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: list[int], group: Any) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        return _gathered(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _scattered(grad, ctx.counts, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: list[int], group: Any) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        return _scattered(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _gathered(grad, ctx.counts, ctx.group), None, None


def exchange_rows(x: torch.Tensor, *, send: Sequence[int], receive: Sequence[int], group: Any) -> torch.Tensor:
    """x [sum of send, width] -> [sum of receive, width]. send, receive: rows to and from each rank of the group."""
    return x if group.size() == 1 else _Exchange.apply(x, list(send), list(receive), group)


def gather_rows(x: torch.Tensor, *, counts: Sequence[int], group: Any) -> torch.Tensor:
    """x [counts of this rank, width] -> [sum of counts, width]. counts: rows of each rank of the group."""
    return x if group.size() == 1 else _Gather.apply(x, list(counts), group)


def scatter_rows(x: torch.Tensor, *, counts: Sequence[int], group: Any) -> torch.Tensor:
    """x [sum of counts, width] -> [counts of this rank, width], summed over the ranks. counts: rows of each rank of the group."""
    return x if group.size() == 1 else _Scatter.apply(x, list(counts), group)


def _exchanged(x: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
    received = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receive, send, group=group)
    return received


def _gathered(x: torch.Tensor, counts: list[int], group: Any) -> torch.Tensor:
    most = _padded_rows(counts)
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: len(x)] = x
    whole = x.new_empty(most * len(counts), *x.shape[1:])
    dist.all_gather_into_tensor(whole, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(whole.split(most), counts, strict=True)])


def _scattered(x: torch.Tensor, counts: list[int], group: Any) -> torch.Tensor:
    most = _padded_rows(counts)
    padded = x.new_zeros(len(counts), most, *x.shape[1:])
    for place, part in zip(padded, x.split(counts), strict=True):
        place[: len(part)] = part
    own = x.new_empty(most, *x.shape[1:])
    dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=group)
    return own[: counts[group.rank()]].contiguous()


def _padded_rows(counts: list[int]) -> int:
    """At least one, so that each rank has a part also if the router sends no token to these experts."""
    return max(1, *counts)
