"""Makes the copies of one rank: at a step boundary it is asked for one, and a thread makes it while the next step runs.

    step boundary   pieces of the live state (the same source as a save's)
    thread          live tensors --copy and fingerprint, one pass--> own memory (staged; the optimizer may update) --> record
                    own memory --send--> the peer's node; the same from each rank whose second copy is kept here --> records

Each copy has two generations. A copy begins only when all ranks have finished the one before it, so the older generation of every
rank is complete at any time. The peer is on another node, so a rank's state survives its process, its node, or the whole job.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from recipes.schema import units
from recipes.schema.errors import CheckpointError, Problem, refuse
from recipes.schema.memory_copies import MemoryCopiesConfig
from train.checkpoint import storage
from train.checkpoint.files import Piece
from train.checkpoint.manifest import Manifest, RunState
from train.checkpoint.staging import Source, copy_pieces
from train.checkpoint.writing import plan_file
from train.copies.place import Place, remove_place
from train.copies.slot import GENERATIONS, Record, Slot, digest, slots_in
from train.engine import Engine
from train.parallel.mesh import Mesh

log = logging.getLogger(__name__)

_CLOSE_S = 10.0
"""How long a failing run waits for an unfinished copy; the peer may be dead."""


@dataclass(frozen=True)
class Neighbours:
    """Which ranks exchange copies, as one rank sees it."""

    peer: int | None
    """The rank that keeps this rank's second copy; None without one."""
    held: tuple[int, ...]
    """Ranks whose second copy this rank keeps."""
    on_node: tuple[int, ...]
    """Ranks of this rank's node."""
    kept_on_node: frozenset[int]
    """Ranks with a copy on this rank's node."""


def neighbours(nodes: list[str], rank: int, *, peer_nodes: int) -> Neighbours:
    """nodes: name of each rank's node. The peer is the rank with the same index on the node `peer_nodes` further on."""
    ranks: dict[str, list[int]] = {}
    for one, node in enumerate(nodes):
        ranks.setdefault(node, []).append(one)
    names = list(ranks)
    peers: list[int | None] = []
    for one, node in enumerate(nodes):
        other = names[(names.index(node) + peer_nodes) % len(names)]
        theirs = ranks[other]
        peers.append(theirs[ranks[node].index(one) % len(theirs)] if other != node else None)
    on_node = ranks[nodes[rank]]
    held = [one for one, peer in enumerate(peers) if peer == rank]
    kept = {*on_node, *(one for one, peer in enumerate(peers) if peer in on_node)}
    return Neighbours(peers[rank], tuple(held), tuple(on_node), frozenset(kept))


class MemoryCopies:
    """The copies that one rank makes and keeps. Methods that are collective say so."""

    def __init__(self, config: MemoryCopiesConfig, mesh: Mesh, place: Place, *, nodes: list[str], attempt: str) -> None:
        """nodes: name of each rank's node. attempt: random text of this start, the same on every rank."""
        self.config, self.mesh, self.place, self.nodes, self.attempt = config, mesh, place, nodes, attempt
        self.around = neighbours(nodes, mesh.rank, peer_nodes=config.peer_nodes)
        self.newest_step = 0
        """Step of this rank's newest copy."""
        self.made = 0
        self.stall_s = 0.0
        """Seconds that training has waited for copies."""
        self.is_on = True
        self._slots = {rank: slots_in(place.folder, rank) for rank in (mesh.rank, *self.around.held)}
        self._next = dict.fromkeys(self._slots, 0)
        """Generation that the next copy of a rank overwrites."""
        self._copy: _Copy | None = None

    def is_due(self, step: int) -> bool:
        """Whether the recipe asks for a copy after `step`."""
        return self.is_on and step % self.config.every_steps == 0

    def prepare(
        self,
        engine: Engine,
        state: RunState,
        *,
        stream: Mapping[str, torch.Tensor],
        used: tuple[int, str] | None,
    ) -> str | None:
        """Allocate all memory. -> a warning if that fails; copies are then off. Collective.

        used: step and attempt of the copies that the run continues from; others are deleted.

        Raises RecipeError on every rank if the folder's file system is too small even when it is empty.
        """
        self.newest_step = used[0] if used is not None else 0
        _, small = storage.state_at_boundary(engine, state, stream)
        size = plan_file([*storage.state_until_update(engine), *small]).bytes
        sizes = self.mesh.gather_objects(size)
        problems = self.mesh.gather_objects(self._too_large(sizes))
        refuse([problem for problem in problems if problem is not None][:1])
        error = None
        try:
            if self.mesh.rank == self.around.on_node[0]:
                self._delete_unused(used)
        except OSError as caught:
            error = _reason(caught, self.place.folder)
        self.mesh.barrier()  # memory that is not needed any more is free
        try:
            for rank, slots in self._slots.items():
                for generation, slot in enumerate(slots):
                    if slot.read() is not None:  # what the run continues from: the next copy must not overwrite it
                        self._next[rank] = 1 - generation
                    else:
                        slot.buffer(sizes[rank])
        except (CheckpointError, OSError) as caught:
            error = _reason(caught, self.place.folder)
        return self._off(error) if self.mesh.any_rank(error is not None) else None

    def request(self, engine: Engine, state: RunState, *, stream: Mapping[str, torch.Tensor]) -> None:
        """Copy the engine's current state. Collective; only when all ranks have finished the copy before."""
        started = time.perf_counter()
        assert not self.is_copying, "a copy begins when all ranks have finished the one before it"
        manifest, small = storage.state_at_boundary(engine, state, stream)
        targets = {rank: slots[self._next[rank]] for rank, slots in self._slots.items()}
        self._next = {rank: 1 - generation for rank, generation in self._next.items()}
        self._copy = _Copy(self, engine, manifest, small, targets)
        threading.Thread(target=self._copy.run, name=f"copy of step {state.step}", daemon=True).start()
        self.stall_s += time.perf_counter() - started

    def before_update(self) -> None:
        """Wait until the running copy has read what the optimizer is about to change. Not collective."""
        if self._copy is not None and not self._copy.staged.is_set():
            started = time.perf_counter()
            self._copy.staged.wait()
            self.stall_s += time.perf_counter() - started

    @property
    def is_copying(self) -> bool:
        """Whether this rank has an unfinished copy."""
        return self._copy is not None and not self._copy.done.is_set()

    @property
    def has_failed(self) -> bool:
        """Whether this rank's last copy failed."""
        return self._copy is not None and self._copy.done.is_set() and self._copy.error is not None

    def turn_off(self) -> str:
        """After a copy failed on any rank: make no more copies in this process. -> a warning with the reason. Collective."""
        return self._off(self._copy.error if self._copy is not None else None)

    def _off(self, error: str | None) -> str:
        """error: this rank's, if it has one."""
        self.is_on = False
        errors = self.mesh.gather_objects(error)
        why = next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None), "")
        return (
            f"copies in memory (run.memory_copies) are off until the next start: {why}. Training continues, and checkpoints are "
            f"not affected."
        )

    def wait(self) -> None:
        """Wait until the running copy has succeeded or failed."""
        if self._copy is not None:
            self._copy.done.wait()

    def close(self) -> None:
        """At the end of a failed run: let a running copy end. The copies stay."""
        if self._copy is not None:
            self._copy.done.wait(_CLOSE_S)

    def end(self, saved_step: int) -> bool:
        """The run has ended and saved `saved_step`: delete all copies, unless they are newer. -> whether. Collective."""
        self.wait()
        is_saved = max(self.mesh.gather_objects(self.newest_step)) <= saved_step
        if is_saved:
            self.delete()
        return is_saved

    def discard(self) -> None:
        """The run goes back to a checkpoint: copies of later steps must not be used. Not collective."""
        self.wait()
        for slots in self._slots.values():
            for slot in slots:
                slot.invalidate()
        self.newest_step = 0

    def delete(self) -> None:
        """Delete the copies that this rank keeps. Not collective."""
        for slots in self._slots.values():
            for slot in slots:
                slot.remove()
        if self.mesh.rank == self.around.on_node[0]:
            remove_place(self.place)

    def _too_large(self, sizes: list[int]) -> Problem | None:
        """The problem that this node's copies do not fit the file system, even if it were empty. sizes: of each rank's copy.
        Collective."""
        kept = self.mesh.gather_objects(sum(sizes[rank] for rank in self._slots))
        system = os.statvfs(self.place.folder)
        available = system.f_blocks * system.f_frsize
        needed = GENERATIONS * sum(kept[rank] for rank in self.around.on_node)
        if needed <= available:
            return None
        return Problem(
            "run.memory_copies",
            f"run.memory_copies needs {units.gib(needed)} in {self.config.folder} of {self.place.node}, which has "
            f"{units.gib(available)} in all.",
            "Enlarge it (mount -o remount,size=... or --shm-size of a container), keep half as much with "
            "run.memory_copies.peer_nodes=0, or make no copies with run.memory_copies.every_steps=0.",
        )

    def _delete_unused(self, used: tuple[int, str] | None) -> None:
        """Delete copies on this node of ranks that have none here any more, and records of other copies than `used`."""
        for slot in slots_in(self.place.folder):
            if slot.rank not in self.around.kept_on_node:
                slot.remove()
                continue
            try:
                record = slot.read()
            except CheckpointError:
                record = None
            if record is None or (record.manifest.step, record.attempt) != used:
                slot.invalidate()


class _Copy:
    """One copy of this rank's state, and of the states that this rank keeps for others. `run` never raises: see `error`."""

    def __init__(
        self, copies: MemoryCopies, engine: Engine, manifest: Manifest, small: list[Piece], targets: dict[int, Slot]
    ) -> None:
        """small: pieces that the next forward pass changes. targets: the slots to overwrite, by rank."""
        self.error: str | None = None
        self.staged = threading.Event()
        self.done = threading.Event()
        self._copies, self._engine, self._manifest, self._small = copies, engine, manifest, small
        self._targets = targets
        self._source = Source(engine.mesh.device)

    def run(self) -> None:
        """Make the copy. Collective over `Mesh.copying`."""
        own, record = None, b""
        try:
            own, record = self._stage()
        except Exception as error:
            self.error = _reason(error, self._copies.place.folder)
        finally:
            self.staged.set()
        try:
            self._exchange(own, record)
        except Exception as error:
            self.error = self.error or _reason(error, self._copies.place.folder)
        if self.error is None:
            self._copies.newest_step = self._manifest.step
            self._copies.made += 1
        self.done.set()

    def _stage(self) -> tuple[torch.Tensor, bytes]:
        """Copy the live state into this node's memory. -> the memory and its record."""
        copies, manifest = self._copies, self._manifest
        plan = plan_file([*storage.state_until_update(self._engine), *self._small])
        slot = self._targets[copies.mesh.rank]
        slot.invalidate()
        buffer = slot.buffer(plan.bytes)
        start = len(plan.header)
        buffer[:start] = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)
        with self._source.stream():
            sums = copy_pieces(plan.pieces, buffer[start:])
        if any(one.not_finite for one in sums):
            raise CheckpointError(f"step {manifest.step} contains NaN or infinity")
        record = Record(
            copies.mesh.rank, copies.place.token, copies.attempt, manifest, digest(plan.header), plan.bytes, sums
        )
        text = record.text()
        slot.publish(text)
        return buffer, text.encode()

    def _exchange(self, own: torch.Tensor | None, record: bytes) -> None:
        """Send this rank's copy to its peer, and receive those that this rank keeps. Ranks without a copy or without memory for
        one take part with size 0, so that no rank waits for ever."""
        peer, held, group = self._copies.around.peer, self._copies.around.held, self._copies.mesh.copying
        if peer is None and not held:
            return
        size = torch.tensor([0 if own is None else own.numel(), len(record)])
        sizes = {rank: torch.zeros(2, dtype=torch.int64) for rank in held}
        transfer([(peer, size)], [*sizes.items()], group=group)
        into: dict[int, torch.Tensor] = {}
        for rank in held:
            self._targets[rank].invalidate()
            try:
                if sizes[rank][0]:
                    into[rank] = self._targets[rank].buffer(int(sizes[rank][0]))
            except OSError as error:
                self.error = self.error or _reason(error, self._copies.place.folder)
        accepted = torch.zeros(1, dtype=torch.uint8)
        answers = [(rank, torch.tensor([rank in into], dtype=torch.uint8)) for rank in held]
        transfer(answers, [(peer, accepted)], group=group)
        text = torch.frombuffer(bytearray(record), dtype=torch.uint8) if record else None
        if not accepted.item():
            own, text = None, None
        texts = {rank: torch.empty(int(sizes[rank][1]), dtype=torch.uint8) for rank in into}
        transfer([(peer, own)], [*into.items()], group=group)
        transfer([(peer, text)], [*texts.items()], group=group)
        for rank, received in texts.items():
            self._targets[rank].publish(received.numpy().tobytes().decode())


def transfer(
    sent: Sequence[tuple[int | None, torch.Tensor | None]],
    received: Sequence[tuple[int | None, torch.Tensor]],
    *,
    group: dist.ProcessGroup | None,
) -> None:
    """Send to and receive from (rank, tensor), all at once; None: nothing. Raises RuntimeError if a peer is lost."""
    works = [dist.isend(x, rank, group=group) for rank, x in sent if rank is not None and x is not None]
    works += [dist.irecv(x, rank, group=group) for rank, x in received if rank is not None]
    for work in works:
        if work is not None:
            work.wait()


def _reason(error: Exception, folder: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or folder}: {error.strerror or error}"
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
