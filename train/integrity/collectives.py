"""Collectives checked by sums: what went in, summed over the ranks, against what came out.

    sum         signed sums in float64 of each rank's input; their sum must be that of the result, up to rounding
    copies      128-bit fingerprints of what was sent and of what arrived must be equal

Inside `CollectiveWatch.watching` torch's functions are replaced, also under the names by which Megatron imported them, so that
gradients, parameters, tensor and expert parallelism and pipeline messages all pass through here. Each call leaves a small
record; `judge` exchanges the records within each group and compares them, so no call waits for a check. Inside
`CollectiveWatch.tracing` the fingerprints of what this rank sent and received are listed in order (for `train.integrity.replay`).

A sum of g numbers is rounded g - 1 times. In the model of `train.native.product_check` (same sources), the signed sum of these
errors is at most LAMBDA u sqrt(g - 1) sum over ranks |x_rank|_2. Sums of whole numbers must be exact. A maximum is only checked
to be the same on all ranks.
"""

import train.megatron  # noqa: F401  prepares Megatron before the imports below

# isort: split
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import layers, mappings

from train.checkpoint import fingerprint
from train.integrity.findings import odd_ones
from train.native.product_check import LAMBDA, UNIT, signs
from train.parallel.mesh import Mesh

_BLOCK = 1 << 20
"""Elements that are summed together, with the same signs in each block: bounds the memory of the float64 copy."""

_FAMILIES = {
    "tp": "tensor", "pp": "pipeline", "cp": "context", "dp": "data", "dp_cp": "data and context", "ep": "expert",
    "expt_tp": "expert-tensor", "expt_dp": "expert data", "tp_ep": "expert and expert-tensor", "embd": "embedding",
    "pos_embd": "position embedding", "tp_cp": "tensor and context", "tp_dp_cp": "tensor, data and context",
    "mp": "model", "tp_ep_pp": "expert model", "intra_dist_opt": "optimizer",
}  # fmt: skip
"""Words for the groups of `Mesh.groups`, which are watched. Others, such as those for saves, are not."""


Trace = list[tuple[bool, str]]
"""What a rank sent and received, in order: (whether it received it, fingerprint)."""


@dataclass(frozen=True)
class _Part:
    """A tensor, or the part of it for one rank, as a record keeps it."""

    digest: str
    total: float
    """Signed sum in float64."""
    norm: float


@dataclass
class _Record:
    """One call on this rank."""

    operation: str
    """`sum` or `same` with a result on every rank, `scattered sum`, `gather`, `exchange`, `broadcast`, `message`."""
    name: str
    unit: float
    """Unit roundoff of the format; 0 for whole numbers."""
    sent: list[_Part]
    got: list[_Part]
    peers: tuple[int, ...] = ()
    """Of a message: (source, target), in the world. Of a broadcast: (source,), in the group."""


@dataclass(frozen=True)
class TransitFault:
    """A collective whose result is not what went in."""

    ranks: tuple[int, ...]
    """In the world: the rank with the wrong result; all of the group if they cannot be told apart."""
    text: str
    is_gather: bool
    """Whether it was a gather over data-parallel ranks, such as that of updated weights."""


class CollectiveWatch:
    """Records the collectives of one engine's training steps."""

    def __init__(self, mesh: Mesh, *, keeps_records: bool) -> None:
        """keeps_records: whether `judge` will be called; otherwise only `tracing` does anything."""
        self._mesh = mesh
        self._keeps_records = keeps_records
        self._trace: Trace | None = None
        self._is_watching = False
        self._families: dict[Any, str] = {}
        for attribute, group in sorted(vars(mesh.groups).items(), key=lambda one: one[0] not in _FAMILIES):
            if isinstance(group, dist.ProcessGroup) and group.size() > 1:
                self._families.setdefault(group, _FAMILIES.get(attribute, attribute))
        self._records: dict[Any, list[_Record]] = defaultdict(list)
        self._coalesced: list[Callable[[], None]] | None = None
        self._calls = itertools.count(1)

    @contextmanager
    def tracing(self, trace: "Trace") -> Iterator[None]:
        """List what this rank sends to and receives from other ranks of its replica inside the block."""
        self._trace = trace
        try:
            with self.watching() if any(map(_is_in_replica, self._families.values())) else nullcontext():
                yield
        finally:
            self._trace = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the calls inside the block. Blocks may be inside each other."""
        if self._is_watching:
            yield
            return
        replaced: dict[tuple[Any, str], Callable[..., Any]] = {
            (dist, "all_reduce"): self._all_reduce,
            (dist, "all_gather_into_tensor"): self._all_gather,
            (dist, "all_gather"): self._all_gather,
            (dist, "reduce_scatter_tensor"): self._reduce_scatter,
            (dist, "all_to_all_single"): self._all_to_all,
            (dist, "broadcast"): self._broadcast,
            (dist, "isend"): self._send,
            (dist, "irecv"): self._receive,
            (dist, "P2POp"): self._message,
            (dist, "batch_isend_irecv"): self._messages,
            (param_and_grad_buffer, "_coalescing_manager"): self._coalescing,
        }
        for module in (param_and_grad_buffer, layers, mappings):
            replaced[(module, "dist_all_gather_func")] = self._all_gather
            replaced[(module, "dist_reduce_scatter_func")] = self._reduce_scatter
        # Each replacement calls what stood there before, which for the buffers' gradients skips groups of one rank.
        before = {place: getattr(*place) for place in replaced}
        self._plain = {name: getattr(dist, name) for module, name in before if module is dist}
        self._begin_coalescing = param_and_grad_buffer._coalescing_manager
        for (module, name), function in replaced.items():
            setattr(module, name, _with_plain(function, before[module, name]))
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False
            for (module, name), function in before.items():
                setattr(module, name, function)

    def forget(self) -> None:
        """Drop the records of a step that is given up."""
        self._records.clear()

    def judge(self) -> list[TransitFault]:
        """Compare the records so far. -> what this rank's groups found. Collective over every group with records."""
        found: dict[str, TransitFault] = {}
        # Groups are numbered in the order in which every rank created them: the same order everywhere, so no deadlock.
        for group in sorted(self._records, key=lambda one: (len(one.group_name), one.group_name)):
            records = self._records[group]
            everyone: list[list[_Record]] = [[] for _ in range(group.size())]
            dist.all_gather_object(everyone, records, group=group)
            for fault in self._compare(everyone, group):
                found.setdefault(fault.text, fault)
        self._records.clear()
        return list(found.values())

    def _compare(self, everyone: list[list[_Record]], group: Any) -> Iterator[TransitFault]:
        world = dist.get_process_group_ranks(group)
        calls = [[one for one in records if one.operation != "message"] for records in everyone]
        assert len({len(records) for records in calls}) == 1, "all ranks of a group make the same calls"
        for same_call in zip(*calls, strict=True):
            wrong, why = _wrong_ranks(list(same_call))
            if wrong:
                yield self._fault(group, tuple(world[index] for index in wrong), f"{same_call[0].name}: {why}")
        messages = [one for records in everyone for one in records if one.operation == "message"]
        for peers in sorted({one.peers for one in messages}):
            sent = [one.sent[0] for one in messages if one.peers == peers and one.sent]
            got = [one.got[0] for one in messages if one.peers == peers and one.got]
            for ours, theirs in zip(sent, got, strict=True):
                if ours.digest != theirs.digest:
                    text = f"message from rank {peers[0]}: what arrived is not what was sent"
                    yield self._fault(group, (peers[1],), text)

    def _fault(self, group: Any, ranks: tuple[int, ...], text: str) -> TransitFault:
        family = self._families[group]
        members = ", ".join(map(str, dist.get_process_group_ranks(group)))
        is_gather = "data" in family and text.startswith("gather")
        return TransitFault(ranks, f"{text} (the {family} group, ranks {members})", is_gather)

    def _sent(self, group: Any, tensors: Iterable[torch.Tensor]) -> list[_Part]:
        parts = [_part(one) for one in tensors]
        if self._trace is not None and _is_in_replica(self._families[group]):
            self._trace += [(False, one.digest) for one in parts]
        return parts

    def _note(self, group: Any, record: _Record) -> None:
        if self._keeps_records:
            self._records[group].append(record)
        if self._trace is not None and _is_in_replica(self._families[group]):
            self._trace += [(True, one.digest) for one in record.got]

    def _keep(self, group: Any, record: Callable[[], _Record], result: Any, *, async_op: bool) -> Any:
        """Make the record when the result is complete. -> what the caller gets in place of the result."""

        def finish() -> None:
            self._note(group, record())

        if self._coalesced is not None:
            self._coalesced.append(finish)
            return result
        if async_op and result is not None:
            return _Waiting(result, finish)
        finish()
        return result

    def _all_reduce(
        self, plain: Any, tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if group not in self._families or not tensor.numel() or op not in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            return plain(tensor, op=op, group=group, async_op=async_op)
        sent, name = self._sent(group, [tensor]), f"all-reduce {next(self._calls)}"
        result = plain(tensor, op=op, group=group, async_op=async_op)
        operation = "sum" if op == dist.ReduceOp.SUM else "same"
        return self._keep(
            group, lambda: _Record(operation, name, _unit(tensor), sent, [_part(tensor)]), result, async_op=async_op
        )

    def _all_gather(self, plain: Any, output: Any, input: Any, group: Any = None, async_op: bool = False) -> Any:
        if group not in self._families or not input.numel():
            return plain(output, input, group=group, async_op=async_op)
        sent, name = self._sent(group, [input]), f"gather {next(self._calls)}"
        result = plain(output, input, group=group, async_op=async_op)

        def record() -> _Record:
            parts = output if isinstance(output, list) else output.reshape(-1).chunk(group.size())
            return _Record("gather", name, 0.0, sent, [_part(part) for part in parts])

        return self._keep(group, record, result, async_op=async_op)

    def _reduce_scatter(
        self,
        plain: Any,
        output: Any,
        input: Any,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if group not in self._families or not output.numel() or op != dist.ReduceOp.SUM:
            return plain(output, input, op=op, group=group, async_op=async_op)
        sent = self._sent(group, input.reshape(-1).chunk(group.size()))
        name = f"scattered sum {next(self._calls)}"
        result = plain(output, input, op=op, group=group, async_op=async_op)
        return self._keep(
            group,
            lambda: _Record("scattered sum", name, _unit(output), sent, [_part(output)]),
            result,
            async_op=async_op,
        )

    def _all_to_all(
        self,
        plain: Any,
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if group not in self._families:
            return plain(output, input, output_split_sizes, input_split_sizes, group=group, async_op=async_op)
        equal = [len(input) // group.size()] * group.size()
        sent = self._sent(group, input.split(input_split_sizes or equal))
        name = f"exchange {next(self._calls)}"
        result = plain(output, input, output_split_sizes, input_split_sizes, group=group, async_op=async_op)

        def record() -> _Record:
            return _Record("exchange", name, 0.0, sent, [_part(p) for p in output.split(output_split_sizes or equal)])

        return self._keep(group, record, result, async_op=async_op)

    def _broadcast(
        self,
        plain: Any,
        tensor: Any,
        src: int | None = None,
        group: Any = None,
        async_op: bool = False,
        group_src: int | None = None,
    ) -> Any:
        if group not in self._families or not tensor.numel():
            return plain(tensor, src, group=group, async_op=async_op, group_src=group_src)
        source = group_src if src is None else dist.get_group_rank(group, src)
        assert source is not None, "a broadcast has a source"
        sent, name = self._sent(group, [tensor]), f"broadcast {next(self._calls)}"
        result = plain(tensor, src, group=group, async_op=async_op, group_src=group_src)
        return self._keep(
            group,
            lambda: _Record("broadcast", name, 0.0, sent, [_part(tensor)], (source,)),
            result,
            async_op=async_op,
        )

    def _is_pipeline(self, group: Any) -> bool:
        """Between two stages Megatron also sends in the group of all ranks."""
        return self._mesh.groups.pp in self._families and group in (self._mesh.groups.pp, None, dist.group.WORLD)

    def _send(self, plain: Any, tensor: Any, dst: int | None = None, group: Any = None, **named: Any) -> Any:
        self._note_sent(tensor, dst, group)
        return plain(tensor, dst, group=group, **named)

    def _receive(self, plain: Any, tensor: Any, src: int | None = None, group: Any = None, **named: Any) -> Any:
        return self._received(tensor, src, group, plain(tensor, src, group=group, **named))

    def _note_sent(self, tensor: Any, peer: int | None, group: Any) -> None:
        if peer is not None and self._is_pipeline(group):
            stages = self._mesh.groups.pp
            self._note(stages, _Record("message", "", 0.0, self._sent(stages, [tensor]), [], (self._mesh.rank, peer)))

    def _received(self, tensor: Any, peer: int | None, group: Any, work: Any) -> Any:
        if peer is None or work is None or not self._is_pipeline(group):
            return work

        def finish() -> None:
            self._note(self._mesh.groups.pp, _Record("message", "", 0.0, [], [_part(tensor)], (peer, self._mesh.rank)))

        return _Waiting(work, finish)

    def _message(self, plain: Any, op: Any, *arguments: Any, **named: Any) -> Any:
        """torch compares the function with its own."""
        own = {dist.isend: self._plain["isend"], dist.irecv: self._plain["irecv"]}
        return plain(own.get(op, op), *arguments, **named)

    def _messages(self, plain: Any, operations: list[Any]) -> list[Any]:
        for one in operations:
            if one.op is self._plain["isend"]:
                self._note_sent(one.tensor, one.peer, one.group)
        works = plain(operations)
        receives = [one for one in operations if one.op is self._plain["irecv"]]
        if len(works) == len(operations):
            return [
                self._received(one.tensor, one.peer, one.group, work) if one in receives else work
                for one, work in zip(operations, works, strict=True)
            ]
        for one in receives:  # one piece of work for all of them
            works[-1] = self._received(one.tensor, one.peer, one.group, works[-1])
        return works

    @contextmanager
    def _coalescing(self, plain: Any, *arguments: Any, async_ops: bool = False, **named: Any) -> Iterator[Any]:
        """Calls in this block may be made only at its end."""
        finished: list[Callable[[], None]] = []
        self._coalesced = finished
        try:
            with plain(*arguments, async_ops=async_ops, **named) as manager:
                yield manager
        finally:
            self._coalesced = None

        def finish() -> None:
            for one in finished:
                one()
            finished.clear()

        if async_ops:
            wait = manager.wait

            def wait_and_finish() -> None:
                wait()
                finish()

            manager.wait = wait_and_finish
        else:
            finish()


class _Waiting:
    """A running collective whose record is made when it has ended. With gloo, a message that has arrived must not be waited for
    again: the second wait never returns."""

    def __init__(self, work: Any, finish: Callable[[], None]) -> None:
        self._work, self._finish = work, finish
        self._is_finished = False

    def wait(self, *arguments: Any) -> Any:
        if self._is_finished:
            return True
        result = self._work.wait(*arguments)
        self._is_finished = True
        self._finish()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _is_in_replica(family: str) -> bool:
    """Whether the ranks of such a group compute the same rows together."""
    return "data" not in family


def _with_plain(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: function(plain, *arguments, **named)


def _wrong_ranks(same_call: list[_Record]) -> tuple[list[int], str]:
    """(indices of the ranks at fault, why); no rank if the call was right."""
    first, count = same_call[0], len(same_call)
    everyone = list(range(count))
    match first.operation:
        case "gather" | "broadcast":
            sources = first.peers or everyone
            bad = [
                (source, receiver)
                for place, source in enumerate(sources)
                for receiver in everyone
                if same_call[receiver].got[place].digest != same_call[source].sent[0].digest
            ]
            return _at_fault(bad, count), "what arrived is not what was sent"
        case "exchange":
            bad = [
                (source, receiver)
                for source in everyone
                for receiver in everyone
                if same_call[receiver].got[source].digest != same_call[source].sent[receiver].digest
            ]
            return _at_fault(bad, count), "what arrived is not what was sent"
        case "scattered sum":
            wrong = [
                place for place in everyone if not _adds_up([one.sent[place] for one in same_call], same_call[place])
            ]
            return wrong, "the sum is not that of what was sent"
        case "sum":
            wrong = [place for place in everyone if not _adds_up([one.sent[0] for one in same_call], same_call[place])]
            if wrong:
                return wrong, "the sum is not that of what was sent"
    digests = [one.got[0].digest for one in same_call]
    if len(set(digests)) == 1:
        return [], ""
    return odd_ones(digests) or everyone, "the result differs between ranks"


def _at_fault(bad: list[tuple[int, int]], count: int) -> list[int]:
    """A sender whose data is wrong on all other ranks of three or more, else the receivers."""
    for source in {source for source, _ in bad}:
        if count > 2 and len({receiver for one, receiver in bad if one == source} - {source}) == count - 1:
            return [source]
    return sorted({receiver for _, receiver in bad})


def _adds_up(sent: list[_Part], record: _Record) -> bool:
    total, norm = math.fsum(one.total for one in sent), math.fsum(one.norm for one in sent)
    bound = LAMBDA * record.unit * math.sqrt(len(sent) - 1) * norm + 1e-12 * norm  # of the sums in float64
    return not math.isfinite(norm) or abs(record.got[0].total - total) <= bound


def _unit(tensor: torch.Tensor) -> float:
    return UNIT.get(tensor.dtype, 0.0)


def _part(tensor: torch.Tensor) -> _Part:
    flat = tensor.detach().reshape(-1).contiguous()
    digest = fingerprint.text(fingerprint.of_box(flat, whole=flat.shape, offset=(0,), shape=flat.shape))
    if not flat.numel():
        return _Part(digest, 0.0, 0.0)
    r = signs(min(flat.numel(), _BLOCK), flat.device)
    total = sum(float(block.double() @ r[: len(block)]) for block in flat.split(_BLOCK))
    return _Part(digest, total, float(torch.linalg.vector_norm(flat.double())))
