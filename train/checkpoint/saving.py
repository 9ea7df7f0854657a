"""One save, from the request at a step boundary to a durable checkpoint. Each rank creates a `Save`; they act collectively.

    every rank   fingerprint live tensors, copy them (staged)            the optimizer must not update before this is done
    rank 0       make .step_N.writing
    every rank   write its file and fsync it; meanwhile read it back and compare fingerprints (train.checkpoint.writing)
    rank 0       add up fingerprints, check that nothing is missing, manifest, fsync all, rename, pointer    (durable)
    rank 0       delete checkpoints that are no longer kept

It runs in a background thread or in the caller's thread. The ranks use a separate process group, so that a background save
cannot mix with the collectives of training. A thread dies with its process: a killed trainer leaves no writer running.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from data.system import disk
from data.system.retry import wait_s
from recipes.schema.errors import CheckpointError
from train.checkpoint import fingerprint, publishing, stale
from train.checkpoint.files import Piece, bytes_of
from train.checkpoint.fingerprint import Sums
from train.checkpoint.manifest import DTYPE_NAMES, Index, Manifest, StoredBox, TensorRecord, describe_not_finite
from train.checkpoint.pieces import OptimizerPart, part_pieces
from train.checkpoint.staging import Source, Staging, copy_pieces
from train.checkpoint.writing import FilePlan, plan_file, write_verified

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """An event of a save or of a copy to storage; `fields` go into the run's record."""

    kind: Literal[
        "save_requested", "save_staged", "save", "save_retried", "save_failed",
        "storage_fetch", "storage_copy", "storage_retried", "storage_failed", "warning",
    ]  # fmt: skip
    step: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes in a save."""

    manifest: Manifest
    """Without tensors, files and digest, which are known only after writing."""
    pieces: list[Piece]
    parts: list[OptimizerPart] = field(default_factory=list)
    """Optimizer parts to check for a change since the last save (train.checkpoint.stale); empty: no check."""
    copies: list[Piece] = field(default_factory=list)
    """Weights that this rank also trains but another rank writes: compared, not written."""


class Peers:
    """The ranks of a save, in a separate gloo group (`Mesh.saving`)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.is_alone = group is None
        self.rank = 0 if group is None else dist.get_rank()
        self.group = group

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0; None on the others."""
        if self.is_alone:
            return [value]
        values = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.is_alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


Memory = dict[str, stale.PartSums]
"""Fingerprints of this rank's optimizer parts at its last save, by `part_key`."""


@dataclass(frozen=True)
class _RankResult:
    """What a rank reports to rank 0 after writing."""

    error: str | None
    may_retry: bool = True
    file: str = ""
    entries: list[tuple[str, tuple[int, ...], str, int, tuple[int, ...], tuple[int, ...], Sums]] = field(
        default_factory=list
    )
    """tensor, whole shape, dtype, start, offset, shape, sums"""
    copies: list[tuple[str, int, Sums]] = field(default_factory=list)
    """tensor, elements, sums"""
    fingerprint_cpu_s: float = 0.0


@dataclass(frozen=True)
class _Outcome:
    """The result of an attempt, which rank 0 sends to all ranks."""

    error: str | None
    may_retry: bool = False
    is_numeric: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


class Save:
    """One rank's part of one save. `run` does all of it, in any thread, and never raises: see `error`."""

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        peers: Peers,
        memory: Memory,
        staging: Staging | None,
        prepare: Callable[[], Path],
        publish: Callable[[Path, Manifest], dict[str, Any]],
        delete_old: Callable[[], None] = lambda: None,
        advice: Callable[[], str] = lambda: "",
        retries: int,
        retry_wait_s: float,
    ) -> None:
        """staging: copy the tensors there first (a background save); None writes from the live tensors.

        prepare, publish, delete_old: called on rank 0 before writing, after writing, and after all ranks know that the save is
        durable. prepare returns the new folder to write into, publish gets it. advice: called on rank 0 if the state is refused
        because of NaN or infinity. memory is updated in place when the save is durable.
        """
        self.step = snapshot.manifest.step
        self.error: str | None = None
        self.is_numeric = False
        """Whether `error` is about NaN or infinity in the state."""
        self.events: list[Event] = []
        self.staged = threading.Event()
        self.done = threading.Event()
        self._snapshot, self._peers = snapshot, peers
        self._unfinished: Path | None = None
        """The folder of this attempt; None if it could not be made."""
        self._memory, self._staging = memory, staging
        self._prepare, self._publish, self._delete_old, self._advice = prepare, publish, delete_old, advice
        self._retries, self._retry_wait_s = retries, retry_wait_s
        self._plan: FilePlan = plan_file(snapshot.pieces)
        self._sums: list[Sums] = []
        self._copies: list[tuple[str, int, Sums]] = []
        self._body: list[memoryview] = []
        self._seen: Memory = {}
        self._seconds: dict[str, float] = {}
        self._cpu_s = 0.0
        self._started = time.perf_counter()
        self._source = Source(snapshot.pieces[0].data.device if snapshot.pieces else torch.device("cpu"))
        self._note("save_requested", bytes=self._plan.bytes)

    def run(self) -> None:
        """Stage, write, publish. Collective over the peers."""
        problem: str | None = None
        may_retry = True
        try:
            problem = self._stage()
            may_retry = problem is None
        except Exception as error:
            problem = f"could not stage step {self.step}: {type(error).__name__}: {error}"
        finally:
            self.staged.set()
        try:
            self._attempts(problem, may_retry)
        except Exception as error:
            self.error = f"could not save step {self.step}: {type(error).__name__}: {error}"
        if self.error is not None:
            self._note("save_failed", error=self.error)
        self.done.set()

    def _stage(self) -> str | None:
        """Fingerprint the live tensors and copy them in the same pass. -> an error message if one is stale."""
        started, cpu = time.perf_counter(), time.thread_time()
        staging = self._staging
        if staging is None and self._source.device.type == "cuda":
            staging = Staging()
        with self._source.stream():
            if staging is not None:
                buffer = staging.of_size(sum(piece.bytes for piece in self._plan.pieces), self._source.device)
                self._sums = copy_pieces(self._plan.pieces, buffer)
                self._body = [bytes_of(buffer)] if buffer.numel() else []
            else:  # the caller waits, so the tensors do not change: fingerprints are taken while the file is written
                self._body = [bytes_of(piece.data) for piece in self._plan.pieces]
            self._copies = _sums_of_copies(self._snapshot)
        found = self._find_stale()
        self._cpu_s = time.thread_time() - cpu
        self._seconds["stage"] = time.perf_counter() - started
        self._note("save_staged", seconds=self._seconds["stage"])
        return found

    def _find_stale(self) -> str | None:
        """Compare this rank's parts with the last save, if their fingerprints are known. -> an error message if one is stale."""
        if len(self._sums) < len(self._plan.pieces):
            return None
        by_label = {p.label: sums for p, sums in zip(self._plan.pieces, self._sums, strict=True)}
        self._seen = part_sums(self._snapshot, by_label)
        for part in self._snapshot.parts:
            key = part_key(part)
            if key in self._seen and key in self._memory:
                found = stale.problem(part, self._memory[key], self._seen[key])
                if found:
                    return (
                        f"step {self.step} is stale: {key}: {found}. Nothing was published. Either the optimizer does not "
                        f"update this weight, or the saved tensors are not the trained ones."
                    )
        return None

    def _attempts(self, problem: str | None, may_retry: bool) -> None:
        for attempt in range(self._retries + 1):
            outcome = self._attempt(problem, may_retry)
            self.error, self.is_numeric = outcome.error, outcome.is_numeric
            if outcome.error is None:
                self._memory.clear()
                self._memory.update(self._seen)
                self._note("save", **outcome.fields, seconds=time.perf_counter() - self._started, parts=self._seconds)
                if self._peers.rank == 0:
                    self._delete_old()
                return
            if not outcome.may_retry or attempt == self._retries:
                return
            wait = wait_s(attempt + 1, first_s=self._retry_wait_s)
            self._note("save_retried", error=outcome.error, wait_s=wait)
            time.sleep(wait)

    def _attempt(self, problem: str | None, may_retry: bool) -> _Outcome:
        """One try of all ranks: write, check, publish."""
        lap = time.perf_counter()
        self._unfinished, ready = None, None
        if self._peers.rank == 0 and problem is None:
            ready = _failure_of(self._make_folder)
        self._unfinished, ready = self._peers.broadcast((self._unfinished, ready))
        result = _RankResult(problem or ready, may_retry)
        if self._unfinished is not None:
            result = self._write(self._unfinished)
        self._seconds["write"] = time.perf_counter() - lap
        everyone = self._peers.gather(result)
        outcome = None
        if everyone is not None:
            errors = [f"rank {rank}: {each.error}" for rank, each in enumerate(everyone) if each.error is not None]
            if ready is not None:
                errors = [ready]
            if errors:
                outcome = _Outcome("; ".join(errors[:3]), all(each.may_retry for each in everyone))
            else:
                assert self._unfinished is not None, "without a folder every rank has an error"
                outcome = self._conclude(everyone, self._unfinished)
            if outcome.error is not None:
                _failure_of(self._drop_folder)  # frees disk space; if it fails, the next save removes the folder
        return self._peers.broadcast(outcome)

    def _make_folder(self) -> None:
        self._unfinished = self._prepare()

    def _drop_folder(self) -> None:
        if self._unfinished is not None and self._unfinished.is_dir():
            disk.remove_tree(self._unfinished)

    def _write(self, unfinished: Path) -> _RankResult:
        """Write this rank's file and verify it."""
        name = f"rank_{self._peers.rank:05d}.safetensors"
        if not self._plan.pieces:
            return _RankResult(None, copies=self._copies)
        try:
            verified = write_verified(unfinished / name, self._plan, self._body, live=self._sums or None)
        except OSError as error:
            return _RankResult(f"{unfinished / name} cannot be written: {error.strerror or error}")
        except CheckpointError as error:
            return _RankResult(str(error))
        except Exception as error:
            return _RankResult(f"{unfinished / name}: {type(error).__name__}: {error}")
        if not self._sums:
            self._sums = verified.sums
            if found := self._find_stale():
                return _RankResult(found, may_retry=False)
        self._seconds["proof_late"] = verified.late_s
        entries = [
            (p.tensor, p.whole, DTYPE_NAMES[p.data.dtype], start, p.offset, p.shape, sums)
            for p, start, sums in zip(self._plan.pieces, self._plan.starts, self._sums, strict=True)
        ]
        return _RankResult(None, True, name, entries, self._copies, self._cpu_s + verified.cpu_s)

    def _conclude(self, everyone: Sequence[_RankResult], unfinished: Path) -> _Outcome:
        """On rank 0: add up the fingerprints of all ranks, complete the checkpoint, publish it."""
        lap = time.perf_counter()
        try:
            manifest, index = complete(self._snapshot.manifest, everyone)
            if bad := not_finite(manifest, everyone):
                text = f"step {self.step} is not saved: {describe_not_finite(bad)}. {self._advice()}".rstrip()
                return _Outcome(text, is_numeric=True)
            files = {each.file: (unfinished / each.file).stat().st_size for each in everyone if each.file}
            manifest = publishing.seal(unfinished, replace(manifest, files=files), index)
            fields = self._publish(unfinished, manifest)
        except CheckpointError as error:
            return _Outcome(str(error), may_retry=True)
        except OSError as error:
            return _Outcome(f"{unfinished} cannot be completed: {error.strerror or error}", may_retry=True)
        self._seconds["publish"] = time.perf_counter() - lap
        fields |= {"bytes": manifest.bytes}
        if differing := differing_copies(manifest, everyone):
            fields["differing_copies"] = differing
            log.warning(
                "step %d: copies of the same weights differ between ranks: %d weights, e.g. %s. The checkpoint contains one "
                "rank's copy. Either gradients of norms or tied embeddings are reduced differently, or memory is faulty.",
                self.step, len(differing), ", ".join(differing[:3]),
            )  # fmt: skip
        most = max(each.fingerprint_cpu_s for each in everyone)
        return _Outcome(None, fields=fields | {"fingerprint_cpu_s": most})

    def _note(self, kind: Any, **fields: Any) -> None:
        self.events.append(Event(kind, self.step, fields | {"at": time.time()}))


def complete(manifest: Manifest, everyone: Sequence[_RankResult]) -> tuple[Manifest, Index]:
    """The manifest with its tensors, and the index, from the results of all ranks. CheckpointError if a tensor is incomplete or
    has two shapes."""
    sums: dict[str, Sums] = {}
    records: dict[str, tuple[str, tuple[int, ...]]] = {}
    elements: dict[str, int] = {}
    index: Index = {}
    for result in everyone:
        for tensor, whole, dtype, start, offset, shape, part in result.entries:
            if records.setdefault(tensor, (dtype, whole)) != (dtype, whole):
                raise CheckpointError(f"{tensor} is {records[tensor]} on one rank and {(dtype, whole)} on another.")
            sums[tensor] = fingerprint.add(sums.get(tensor, fingerprint.ZERO), part)
            elements[tensor] = elements.get(tensor, 0) + math.prod(shape)
            index.setdefault(tensor, []).append(StoredBox(result.file, start, offset, shape))
    for tensor, (_, whole) in records.items():
        if elements[tensor] != math.prod(whole):
            raise CheckpointError(
                f"{tensor} has {math.prod(whole):,} elements, the ranks wrote {elements[tensor]:,}: a part is missing or "
                f"was written twice."
            )
    tensors = {
        name: TensorRecord(dtype, whole, fingerprint.text(sums[name]), sums[name].not_finite)
        for name, (dtype, whole) in sorted(records.items())
    }
    return replace(manifest, tensors=tensors), index


def not_finite(manifest: Manifest, everyone: Sequence[_RankResult]) -> dict[str, int]:
    """Tensors with NaN or infinity in the written data or in a rank's copy, and the number of such elements."""
    found = dict(manifest.not_finite)
    for result in everyone:
        for tensor, _, part in result.copies:
            if part.not_finite and tensor not in manifest.not_finite:
                found[tensor] = found.get(tensor, 0) + part.not_finite
    return found


def differing_copies(manifest: Manifest, everyone: Sequence[_RankResult]) -> list[str]:
    """Weights whose copy on some rank differs from the written one: fingerprints of n copies must add up to n times its own."""
    sums: dict[str, Sums] = {}
    elements: dict[str, int] = {}
    for result in everyone:
        for tensor, count, part in result.copies:
            sums[tensor] = fingerprint.add(sums.get(tensor, fingerprint.ZERO), part)
            elements[tensor] = elements.get(tensor, 0) + count
    return [
        name
        for name, found in sorted(sums.items())
        if fingerprint.text(found)
        != fingerprint.text(
            fingerprint.times(
                fingerprint.from_text(manifest.tensors[name].fingerprint),
                elements[name] // math.prod(manifest.tensors[name].shape),
            )
        )
    ]


def _sums_of_copies(snapshot: Snapshot) -> list[tuple[str, int, Sums]]:
    return [(piece.tensor, piece.data.numel(), piece.sums()) for piece in snapshot.copies]


def part_key(part: OptimizerPart) -> str:
    """Name of an optimizer part: its first component and its range."""
    return f"{part.local.components[0].name}[{part.start}:{part.end}]"


def part_sums(snapshot: Snapshot, by_label: dict[str, Sums]) -> Memory:
    """Fingerprints of each part's weight, master and moments."""
    seen: Memory = {}
    for part in snapshot.parts:
        sums: stale.PartSums = {}
        for name, pieces in part_pieces(part).items():
            total = fingerprint.ZERO
            for piece in pieces:
                total = fingerprint.add(total, by_label.get(piece.label, fingerprint.ZERO))
            sums[name] = total
        if part.local.is_counted:
            seen[part_key(part)] = sums
    return seen


def _failure_of(action: Callable[[], None]) -> str | None:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or ''}: {error.strerror or error}"
    return None
