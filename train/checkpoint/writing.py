"""Writing one rank's file, and proving it meanwhile: together they take about as long as writing alone.

    this thread      write 8 MB -> let the disk begin to take them -> write the next 8 MB -> ...          -> fsync
    its companion    fingerprint a live piece -> read the piece back -> fingerprint that -> compare -> ...

The companion follows behind the writer and reads through the page cache: what it proves is that the file holds what the model
holds. That the disk took it, the fsync says, through the descriptor that wrote; either failing fails the save.
"""

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.system import disk
from recipes.schema.errors import CheckpointError
from train.checkpoint import fingerprint
from train.checkpoint.files import Piece, header_of, opened, scratch_of_sums, steps_of, sums_on_disk
from train.checkpoint.fingerprint import Sums
from train.checkpoint.manifest import Place


@dataclass(frozen=True)
class FilePlan:
    """What one file will hold: its header, and where in it each piece starts."""

    header: bytes
    pieces: list[Piece]
    """In the order of the file."""
    starts: list[int]
    """Of each piece, in bytes from the file's begin."""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.starts[-1] + self.pieces[-1].bytes if self.pieces else len(self.header)


def plan_file(pieces: Sequence[Piece]) -> FilePlan:
    """Lay pieces out in one file: wide formats first, so that all are aligned."""
    ordered = sorted((p for p in pieces if p.bytes), key=lambda p: -p.data.element_size())
    header, starts = header_of([(p.label, p.data.dtype, p.shape) for p in ordered])
    return FilePlan(header, ordered, starts)


@dataclass(frozen=True)
class Proven:
    """What is known of a file that was written."""

    sums: list[Sums]
    """Fingerprint of each piece."""
    cpu_s: float
    """Processor time of the companion: live fingerprints taken here, reading back, fingerprints of that."""
    late_s: float
    """How long the proof went on after the file was durable."""


def write_proven(
    path: Path, plan: FilePlan, body: Sequence[memoryview], *, live: Sequence[Sums] | None = None
) -> Proven:
    """Write a planned file, make it durable, and compare what can be read back with the live tensors.

    body: the pieces' bytes in order, in as many buffers as one likes. live: the pieces' fingerprints; None takes them
    meanwhile, from pieces that then must stand still. Raises OSError where the system refuses, CheckpointError where the
    file is not what the model holds.
    """
    companion = _Companion(path, plan, live)
    with disk.new_file(path) as handle:
        companion.thread.start()
        try:
            for size in disk.write_in_steps(handle, [plan.header, *body]):
                companion.sizes.put(size)
            disk.sync_file(handle)
        finally:
            durable = time.perf_counter()
            companion.sizes.put(None)
            companion.thread.join()
    if companion.error is not None:
        raise companion.error
    return Proven(companion.sums, companion.cpu_s, time.perf_counter() - durable)


class _Ended(Exception):
    """The writer gave up before the file was complete."""


class _Companion:
    """The thread that proves a file while it is written."""

    def __init__(self, path: Path, plan: FilePlan, live: Sequence[Sums] | None) -> None:
        self.sizes: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        """The writer tells how far it is; None: no further."""
        self.thread = threading.Thread(target=self._run, name=f"proof of {path.name}", daemon=True)
        self.sums: list[Sums] = []
        self.error: Exception | None = None
        self.cpu_s = 0.0
        self._path, self._plan, self._live = path, plan, live
        self._size = 0

    def _run(self) -> None:
        try:
            with opened(self._path) as handle:
                self._prove(handle)
        except _Ended:
            pass  # the writer's own error is raised
        except Exception as error:
            self.error = error
        self.cpu_s = time.thread_time()

    def _prove(self, handle: int) -> None:
        self._wait_for(len(self._plan.header))
        if os.pread(handle, len(self._plan.header), 0) != self._plan.header:
            raise CheckpointError(f"{self._path} does not hold the header that was written to it.")
        scratch = scratch_of_sums()
        for number, (piece, start) in enumerate(zip(self._plan.pieces, self._plan.starts, strict=True)):
            expected = piece.sums() if self._live is None else self._live[number]
            found = fingerprint.ZERO
            dtype = piece.data.dtype
            for step in steps_of(Place(self._path.name, start, piece.offset, piece.shape), dtype, size=disk.STEP):
                self._wait_for(step.start + step.elements * dtype.itemsize)
                part = sums_on_disk(handle, step, whole=piece.whole, dtype=dtype, scratch=scratch)
                found = fingerprint.add(found, part)
            if found != expected:
                raise CheckpointError(
                    f"{self._path}: what lies on disk of {piece.label} is not what the model holds (fingerprint "
                    f"{fingerprint.text(found)} instead of {fingerprint.text(expected)})."
                )
            self.sums.append(expected)

    def _wait_for(self, size: int) -> None:
        while self._size < size:
            told = self.sizes.get()
            if told is None:
                raise _Ended
            self._size = told
