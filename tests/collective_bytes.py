"""What a rank sends in a training step, recorded from torch's process groups: bytes and calls by operation and group."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from train.parallel.mesh import Mesh

SMALL = 16
"""Elements up to which a call is bookkeeping (norms, counts, flags) and not a tensor of the model."""


@dataclass
class Sent:
    """Of one rank."""

    bytes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By (group, operation, format), as a ring sends them: (n-1)/n of a gathered or scattered tensor, twice that for a sum."""
    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    small_calls: int = 0


class Recorder(TorchDispatchMode):
    """Records every collective and message that is started inside, by autograd too (a CPU's backward runs in this thread)."""

    def __init__(self, groups: dict[str, str]) -> None:
        """groups: a name for each process group, by torch's name."""
        super().__init__()
        self.sent = Sent()
        self._groups = groups

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(dist.ProcessGroup.unbox(one) for one in args if isinstance(one, torch.ScriptObject))
        size = group.size()
        if name in ("barrier", "monitored_barrier_", "recv_", "recv_any_source_") or size == 1:
            return
        # Outputs and inputs are arguments of their own (lists of them, nested for some): the larger side is the whole tensor.
        sides = [_tensors(one) for one in args]
        whole = max(sides, key=lambda side: sum(one.numel() for one in side))
        if sum(one.numel() for one in whole) <= SMALL:
            self.sent.small_calls += 1
            return
        size_bytes = sum(one.numel() * one.element_size() for one in whole)
        share = {"allreduce_": 2 * (size - 1) / size, "send": 1.0}.get(name, (size - 1) / size)
        # Interleaved pipelines of two stages send in the group of all ranks too (Megatron's `_p2p_ops`).
        axis = "pipeline" if name == "send" else self._groups[group.group_name]
        key = (axis, name, str(whole[0].dtype).removeprefix("torch."))
        self.sent.bytes[key] += round(size_bytes * share)
        self.sent.calls[key] += 1


def axes_of(mesh: Mesh) -> dict[str, str]:
    """The planner's name of each process group's axis, by torch's name of the group."""
    names = {"tp": "tensor", "pp": "pipeline", "cp": "context", "dp_cp": "data", "embd": "embedding"}
    groups = {axis: getattr(mesh.groups, name) for name, axis in names.items()}
    # Groups of the same ranks may be one group (embd and pp with two stages): the first name counts.
    found: dict[str, str] = {}
    for axis, group in groups.items():
        if group is not None and group.size() > 1:
            found.setdefault(group.group_name, axis)
    return found


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for one in argument for tensor in _tensors(one)] if isinstance(argument, list | tuple) else []
