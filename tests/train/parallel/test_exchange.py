"""Rows that ranks exchange: counts of any size, also none for all ranks, as from a router that has collapsed."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from train.parallel.exchange import exchange_rows, gather_rows, scatter_rows


def one_way_and_back(rank: int, counts: list[int]) -> list[Any]:
    """Gather rows and scatter them again; exchange them and back. Values and gradients."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    x = torch.full((counts[rank], 3), rank + 1.0, requires_grad=True)
    whole = gather_rows(x, counts=counts, group=group)
    own = scatter_rows(whole, counts=counts, group=group)
    send = [0] * rank + [counts[rank]] + [0] * (1 - rank)
    back = exchange_rows(own, send=send, receive=send, group=group)
    (gradient,) = torch.autograd.grad(back.sum(), [x])
    dist.destroy_process_group()
    return [whole.detach(), back.detach(), gradient]


@pytest.mark.parametrize("counts", [[0, 0], [0, 2], [3, 1]])
def test_ranks_without_rows_take_part(counts: list[int]) -> None:
    every = torch.tensor([1.0] * counts[0] + [2.0] * counts[1])[:, None].expand(-1, 3)
    for rank, (whole, back, gradient) in enumerate(run_ranks(2, one_way_and_back, counts)):
        assert torch.equal(whole, every)
        assert torch.equal(back, torch.full((counts[rank], 3), 2.0 * (rank + 1)))  # both ranks' copies are summed
        assert torch.equal(gradient, torch.full((counts[rank], 3), 2.0))
