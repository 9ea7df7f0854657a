"""Bytes that autograd keeps for the backward pass, counted while a step runs. The planner's activations must equal them."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SavedBytes:
    """Bytes of storages of saved tensors: `now`, and the largest number at once."""

    def __init__(self, parameters: set[int]) -> None:
        self.parameters = parameters
        self.held: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0
        self.at_peak: dict[int, tuple[Any, ...]] = {}

    def keep(self, tensor: torch.Tensor) -> "_Kept":
        kept = _Kept(tensor)
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.parameters or tensor.numel() == 0:
            return kept
        if self.held[key] == 0:
            self.sizes[key] = storage.nbytes()
            self.at_peak[key] = (tuple(tensor.shape), tensor.dtype)
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
        self.held[key] += 1
        weakref.finalize(kept, self.drop, key)
        return kept

    def drop(self, key: int) -> None:
        self.held[key] -= 1
        if self.held[key] == 0:
            self.now -= self.sizes.pop(key)


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saved_bytes(chunks: list[Any]) -> Iterator[SavedBytes]:
    """Count inside the block. Parameters (and what shares their memory) do not count: they exist anyway."""
    counter = SavedBytes({p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda kept: kept.tensor):
        yield counter
