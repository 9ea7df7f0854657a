"""Sends the parts of tensors that the ranks of a group have to one owner of each tensor, and the results back.

    rank 0: a0 b0 c0        to owners        rank 0: a0 a1           to parts         rank 0: a0 b0 c0
    rank 1: a1 b1 c1   ----------------->    rank 1: b0 b1 c0 c1   ------------->     rank 1: a1 b1 c1

Work that needs whole tensors is done once by their owners, and so is divided over the ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def assign_owners(costs: Sequence[int], *, ranks: int) -> list[int]:
    """The owner of each tensor: the most expensive tensor first, each to the rank with the least cost so far."""
    owners, loads = [0] * len(costs), [0] * ranks
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += costs[item]
    return owners


class Exchange:
    """The parts of a fixed list of tensors in one group. All ranks of the group make the same calls."""

    def __init__(
        self, sizes: Sequence[Sequence[int]], owners: Sequence[int], *, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        """sizes: elements of each tensor's part on each rank; owners: the owner of each tensor. The same on all ranks."""
        self._group, self._ranks, self._device = group, group.size(), device
        me, ranks = group.rank(), range(group.size())
        self.owned = [item for item, owner in enumerate(owners) if owner == me]
        """The tensors that this rank owns, in the order of the list."""
        self._order = sorted(range(len(owners)), key=lambda item: (owners[item], item))
        self._mine = [sizes[item][me] for item in self._order]
        self._sent = [sum(one[me] for one, owner in zip(sizes, owners, strict=True) if owner == r) for r in ranks]
        self._of_owned = [[sizes[item][rank] for item in self.owned] for rank in ranks]
        self._received = [sum(one) for one in self._of_owned]

    def to_owners(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each tensor that this rank owns: its parts in the order of ranks. parts: this rank's part of every tensor, flat and
        fp32; in a group of one rank they are returned as they are. Collective over the group."""
        if self._ranks == 1:
            return list(parts)
        received = self._send([parts[item] for item in self._order], self._sent, self._received)
        by_rank = [
            part.split(sizes) for part, sizes in zip(received.split(self._received), self._of_owned, strict=True)
        ]
        return [torch.cat(pieces) for pieces in zip(*by_rank, strict=True)]

    def to_parts(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inverse: this rank's part of every tensor. tensors: those that this rank owns. Collective over the group."""
        if self._ranks == 1:
            return list(tensors)
        pieces = [tensor.split(list(of)) for tensor, of in zip(tensors, zip(*self._of_owned, strict=True), strict=True)]
        by_rank = [one[rank] for rank in range(self._ranks) for one in pieces]
        received = self._send(by_rank, self._received, self._sent).split(self._mine)
        parts = dict(zip(self._order, received, strict=True))
        return [parts[item] for item in range(len(parts))]

    def _send(self, pieces: list[torch.Tensor], send: list[int], receive: list[int]) -> torch.Tensor:
        sent = torch.cat(pieces) if pieces else torch.empty(0, device=self._device)
        received = torch.empty(sum(receive), device=self._device)
        dist.all_to_all_single(received, sent, receive, send, group=self._group)
        return received
