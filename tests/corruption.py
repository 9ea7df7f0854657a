"""Planted corruption: bits flipped in weights, moments, activations and rows of one rank, and the state put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from train.engine import Engine
from train.integrity.state import StateWatch

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def flip(values: torch.Tensor, *, element: int, bit: int) -> None:
    """Flip one bit of one element in place. bit: from 0, the lowest of the mantissa."""
    flat = values.detach().view(-1)
    kind = BITS[flat.dtype]
    word = flat[element : element + 1].view(kind)
    mask = 1 << bit if bit < torch.iinfo(kind).bits - 1 else torch.iinfo(kind).min
    word.bitwise_xor_(torch.tensor(mask, dtype=kind))


@contextmanager
def state_kept(engine: Engine) -> Iterator[None]:
    """Restore weights and optimizer state of this rank at the end of the block."""
    watch = StateWatch(engine)
    tensors = [one.tensor.detach() for one in watch._own]
    tensors += [one.tensor.detach() for _, weights in watch._replicated for one in weights]
    counts = [group["step"] for group in engine.optimizer.param_groups]
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
        for group, count in zip(engine.optimizer.param_groups, counts, strict=True):
            group["step"] = count


class ActivationFault:
    """Changes an output element of a module at chosen calls. `calls` counts the module's forward passes."""

    def __init__(self, module: torch.nn.Module, *, at: tuple[int, ...] | None, factor: float | None = None) -> None:
        """at: calls, from 0; None: each. factor: multiply the element; None: flip a bit that moves with every call."""
        self.calls, self._at, self._factor = 0, at, factor
        self._handle = module.register_forward_hook(self._change)

    def remove(self) -> None:
        self._handle.remove()

    def _change(self, _module: Any, _inputs: Any, output: Any) -> Any:
        call, self.calls = self.calls, self.calls + 1
        if self._at is not None and call not in self._at:
            return None
        first = output[0] if isinstance(output, tuple) else output
        changed = first.clone()
        if self._factor is not None:
            changed.view(-1)[7] *= self._factor
        else:
            flip(changed, element=7 + call, bit=21 if changed.dtype == torch.float32 else 5)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed
