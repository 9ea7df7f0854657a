"""Names the operation and the missing rank when a collective operation times out.

    waiting ranks --torch's flight recorder--> group, operation, number --store--> ranks of the group that are missing

gloo's own error names neither. The recorder keeps the last operations of each process (for gloo since torch 2.14).
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_RECORDED = "200"
"""Operations that the recorder keeps: more than a step enqueues between two blocking ones."""
_HUNG = re.compile(r"timed out|timeout", re.IGNORECASE)
_LOST = re.compile(r"Connection (closed|reset)", re.IGNORECASE)
_PATIENCE_S = 2.0
"""Time for the other ranks to report where they wait; they time out almost together."""
_LOST_PATIENCE_S = 0.5
"""The same if a peer has died, which its neighbours see at once: a restart waits for this."""
HANG, LOST = "hang: ", "lost peer: "
"""Prefixes of the line that names the rank: it waited for `timeout_s`, or saw at once that a peer is gone. `launch` shows this
line first, and books the wait of a hang (launch.local.failures)."""


@dataclass(frozen=True)
class Waiting:
    """An operation that a rank has entered but not completed."""

    group: str
    """torch's name of the group."""
    operation: str
    number: int
    """Sequence number among the operations of this group, counted by each rank."""
    ranks: tuple[int, ...]
    """The group's ranks, as world ranks."""


def record_operations() -> None:
    """Switch the recorder on. Call it before the first process group is made, which is when torch reads the variable."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _RECORDED)


@contextlib.contextmanager
def hangs_named(*, timeout_s: float) -> Iterator[None]:
    """Add a note to errors of collective operations that timed out or lost a peer: which rank is missing, in which one."""
    try:
        yield
    except RuntimeError as error:
        is_lost = bool(_LOST.search(str(error)))
        if dist.is_initialized() and dist.get_world_size() > 1 and (is_lost or _HUNG.search(str(error))):
            with contextlib.suppress(Exception):  # a failure here must not hide the original error
                mine = _waiting()
                if mine is not None:
                    found = _exchange(mine, patience_s=_LOST_PATIENCE_S if is_lost else _PATIENCE_S)
                    error.add_note(
                        LOST + _explain(mine, found, until="until a connection was lost")
                        if is_lost
                        else HANG + _explain(mine, found, until=f"launch.timeout_s={timeout_s:g}")
                    )
        raise


def _waiting() -> Waiting | None:
    """The operation this rank waits in; None if the recorder has no entries. Uses private torch functions: no public ones."""
    trace = json.loads(torch._C._distributed_c10d._dump_fr_trace_json())
    entries = trace.get("entries", [])
    if not entries:
        return None
    # The oldest open operation blocks all later ones. If it failed it may be closed already; then it is the last entry.
    entry = next((entry for entry in entries if not entry["retired"]), entries[-1])
    name = str(entry["process_group"][0])
    world = dist.distributed_c10d._world
    groups = [group for group, found in world.pg_names.items() if found == name]
    if not groups:
        return None
    return Waiting(
        group=name,
        operation=str(entry["profiling_name"]).rpartition(":")[2],
        number=int(entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]),
        ranks=tuple(dist.get_process_group_ranks(groups[0])),
    )


def _exchange(mine: Waiting, *, patience_s: float) -> dict[int, Waiting]:
    """The operation in which each rank of the group waits, for ranks that report in time. The store is a thread of rank 0: it
    answers while rank 0 hangs in Python, but not if its process is stopped."""
    store = dist.PrefixStore("stratum-waiting", dist.distributed_c10d._get_default_store())
    store.set_timeout(timedelta(seconds=patience_s))
    found = {dist.get_rank(): mine}
    with contextlib.suppress(RuntimeError):
        store.set(str(dist.get_rank()), json.dumps(asdict(mine)))
        deadline = time.monotonic() + patience_s
        while (missing := [rank for rank in mine.ranks if rank not in found]) and time.monotonic() < deadline:
            for rank in missing:
                if store.check([str(rank)]):
                    reported = json.loads(store.get(str(rank)))
                    found[rank] = Waiting(**{**reported, "ranks": tuple(reported["ranks"])})
            time.sleep(0.05)
    return found


def _explain(mine: Waiting, found: dict[int, Waiting], *, until: str) -> str:
    """The line to show. found: the operations in which ranks of the group wait, including this one. until: when they gave up."""
    there = [rank for rank, one in found.items() if (one.group, one.number) == (mine.group, mine.number)]
    elsewhere = {rank: one for rank, one in found.items() if rank not in there}
    silent = [rank for rank in mine.ranks if rank not in found]
    what = f"{mine.operation} number {mine.number} of the group of {_name(mine.ranks)}"
    text = f"{_name(there)} waited for {what} ({until})"
    if silent:
        text += f"; {_name(silent)} did not arrive and {'is' if len(silent) == 1 else 'are'} in no operation"
    for rank, one in sorted(elsewhere.items()):
        text += f"; rank {rank} was in {one.operation} number {one.number} of the group of {_name(one.ranks)} instead"
    return text


def _name(ranks: "tuple[int, ...] | list[int]") -> str:
    ordered = sorted(ranks)
    shown = ", ".join(map(str, ordered[:8])) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")
    return f"rank{'s' * (len(ordered) > 1)} {shown}"
