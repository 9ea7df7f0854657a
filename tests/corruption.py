"""Planted corruption on one rank: bits flipped in its state, activations, rows, products and transit; the state put back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import layers, mappings

from train.engine import Engine
from train.integrity.state import StateWatch
from train.native import product_check

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


class FaultyProducts:
    """Flips a bit in one element of a product of `train.native.product_check`, right after it is computed. `calls`: so far."""

    def __init__(self) -> None:
        self.calls = 0
        self.target: int | None = None
        self.bit, self.element = 30, 0
        self.change = 0.0
        """Of the element that was flipped."""
        self.floor = 0.0
        """The smallest change that its row's sums must show."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        plain = product_check.multiply

        def multiply(a: torch.Tensor, b: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
            c = plain(a, b, factor=factor)
            if self.calls == self.target:
                c = c.contiguous()
                element = self.element % c.numel()
                before = c.view(-1)[element].item()
                flip(c, element=element, bit=self.bit)
                self.change = abs(c.view(-1)[element].item() - before)
                row, k = a[element // c.shape[1]].double(), b.shape[0]
                self.floor = 2 * float(row.norm() * b.double().norm()) * abs(factor) * product_check.LAMBDA * 2.0**-24
                self.floor *= (k + 1) ** 0.5
            self.calls += 1
            return c

        product_check.multiply = multiply
        try:
            yield
        finally:
            product_check.multiply = plain


class _Arriving:
    """A message that is damaged when it has arrived. With gloo a second wait for it would never return."""

    def __init__(self, work: Any, arrived: Callable[[], None]) -> None:
        self._work, self._arrived = work, arrived

    def wait(self) -> bool:
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._arrived()
        return True


class FaultyTransit:
    """Flips a bit in one tensor that this rank receives from a collective or message. `calls` names them in order.

    The first one from number `target` on with elements (an exchange of experts may bring none), of the kind `only`.
    """

    def __init__(self, mesh: Any) -> None:
        self._unwatched = (None, mesh.watching, mesh.saving, mesh.copying)
        self._is_virtual = mesh.layout.virtual > 1
        self.calls: list[str] = []
        self.target: int | None = None
        self.only: str | None = None
        self.hit: str | None = None
        """What was damaged."""
        self.bit, self.element = 30, 0
        self.change = 0.0
        self.unit = 0.0
        """Unit roundoff of the tensor's format; 0 for copies."""
        self.norm = 0.0
        self._waiting: list[Any] | None = None

    def _arrived(self, name: str, tensor: torch.Tensor, unit: bool) -> None:
        is_due = self.target is not None and len(self.calls) >= self.target and self.only in (None, name)
        if is_due and tensor.numel():
            self.target, self.hit = None, name
            flat = tensor.detach().view(-1)
            element = self.element % flat.numel()
            before = flat[element].item()
            if flat.dtype in BITS:
                flip(flat, element=element, bit=self.bit % (8 * flat.element_size()))
            else:
                flat[element] += 1
            self.change = abs(flat[element].item() - before)
            self.unit = torch.finfo(flat.dtype).eps / 2 if unit and flat.dtype in BITS else 0.0
            self.norm = float(flat.double().nan_to_num().norm())
        self.calls.append(name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        def collective(name: str, plain: Any, unit: bool) -> Any:
            def call(output: Any, *arguments: Any, **named: Any) -> Any:
                group = named.get("group")
                result = plain(output, *arguments, **named)
                if group in self._unwatched or group.size() == 1:
                    return result
                tensors = output if isinstance(output, list) else [output]

                def arrived() -> None:
                    self._arrived(name, tensors[-1], unit)

                if self._waiting is not None:
                    self._waiting.append(arrived)
                else:
                    if result is not None:
                        result.wait()
                    arrived()
                return result

            return call

        @contextmanager
        def coalescing(*arguments: Any, async_ops: bool = False, **named: Any) -> Iterator[Any]:
            waiting: list[Callable[[], object]] = []
            self._waiting = waiting
            with plain_coalescing(*arguments, async_ops=async_ops, **named) as manager:
                yield manager
            self._waiting = None

            def finish() -> None:
                while waiting:
                    waiting.pop(0)()

            if async_ops:
                wait = manager.wait

                def wait_and_finish() -> None:
                    wait()
                    finish()

                manager.wait = wait_and_finish
            else:
                finish()

        def receive(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            return _Arriving(
                plain_receive(tensor, *arguments, **named), lambda: self._arrived("message", tensor, False)
            )

        def messages(operations: list[Any]) -> list[Any]:
            works = plain_messages(operations)
            received = [one.tensor if one.op is plain_receive else None for one in operations]
            return [
                _Arriving(work, partial(self._arrived, "message", tensor, False)) if tensor is not None else work
                for tensor, work in zip(received, works, strict=True)
            ]

        plain_messages = dist.batch_isend_irecv
        plain_coalescing, plain_receive = param_and_grad_buffer._coalescing_manager, dist.irecv
        names = {
            "all_reduce": True, "all_gather_into_tensor": False, "all_gather": False, "reduce_scatter_tensor": True,
            "all_to_all_single": False,
        }  # fmt: skip
        places = [(dist, name, unit) for name, unit in names.items()]
        for module in (param_and_grad_buffer, layers, mappings):
            places += [(module, "dist_all_gather_func", False), (module, "dist_reduce_scatter_func", True)]
        before = [(module, name, getattr(module, name)) for module, name, _ in places]
        for (module, name, unit), (_, _, plain) in zip(places, before, strict=True):
            setattr(module, name, collective(name, plain, unit))
        param_and_grad_buffer._coalescing_manager, dist.batch_isend_irecv = coalescing, messages
        if self._is_virtual:  # otherwise Megatron hands the function itself to torch, which knows only its own
            dist.irecv = receive
        try:
            yield
        finally:
            for module, name, plain in before:
                setattr(module, name, plain)
            param_and_grad_buffer._coalescing_manager, dist.batch_isend_irecv = plain_coalescing, plain_messages
            dist.irecv = plain_receive
