"""Writes one rank's file and verifies it at the same time. This takes about as long as writing alone.

    writer thread      write 8 MB -> start its write-back -> write the next 8 MB -> ...                      -> fsync
    verifier thread    fingerprint a live piece -> read the piece back -> fingerprint that -> compare -> ...

The verifier follows the writer and reads through the page cache, so it proves that the file's content equals the model's. The
fsync on the writing descriptor proves that the content reached the disk. If either fails, the save fails.
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
from train.checkpoint.manifest import StoredBox


@dataclass(frozen=True)
class FilePlan:
    """Content of one file: its header, its pieces, and where each starts."""

    header: bytes
    pieces: list[Piece]
    """In the order of the file."""
    starts: list[int]
    """Of each piece, in bytes from the start of the file."""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.starts[-1] + self.pieces[-1].bytes if self.pieces else len(self.header)


def plan_file(pieces: Sequence[Piece]) -> FilePlan:
    """Order pieces in one file: wide dtypes first, so that all are aligned."""
    ordered = sorted((p for p in pieces if p.bytes), key=lambda p: -p.data.element_size())
    header, starts = header_of([(p.label, p.data.dtype, p.shape) for p in ordered])
    return FilePlan(header, ordered, starts)


@dataclass(frozen=True)
class VerifiedFile:
    """Result of writing and verifying a file."""

    sums: list[Sums]
    """Fingerprint of each piece."""
    cpu_s: float
    """CPU time of the verifier: fingerprints of live tensors, reading back, fingerprints of what was read."""
    late_s: float
    """How long verification took after the file was durable."""


def write_verified(
    path: Path, plan: FilePlan, body: Sequence[memoryview], *, live: Sequence[Sums] | None = None
) -> VerifiedFile:
    """Write a planned file, make it durable, read it back and compare it with the live tensors.

    body: the pieces' bytes in order, in any number of buffers. live: the pieces' fingerprints; None computes them here, and
    the pieces must not change meanwhile. Raises OSError if writing fails, CheckpointError if the file differs from the model.
    """
    verifier = _Verifier(path, plan, live)
    with disk.new_file(path) as handle:
        verifier.thread.start()
        try:
            for size in disk.write_in_steps(handle, [plan.header, *body]):
                verifier.sizes.put(size)
            disk.sync_file(handle)
        finally:
            durable = time.perf_counter()
            verifier.sizes.put(None)
            verifier.thread.join()
    if verifier.error is not None:
        raise verifier.error
    return VerifiedFile(verifier.sums, verifier.cpu_s, time.perf_counter() - durable)


class _WriterStopped(Exception):
    """The writer stopped before the file was complete."""


class _Verifier:
    """The thread that verifies a file while it is written."""

    def __init__(self, path: Path, plan: FilePlan, live: Sequence[Sums] | None) -> None:
        self.sizes: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        """Size of the file so far, from the writer; None: the writer is done."""
        self.thread = threading.Thread(target=self._run, name=f"verify {path.name}", daemon=True)
        self.sums: list[Sums] = []
        self.error: Exception | None = None
        self.cpu_s = 0.0
        self._path, self._plan, self._live = path, plan, live
        self._size = 0

    def _run(self) -> None:
        try:
            with opened(self._path) as handle:
                self._verify(handle)
        except _WriterStopped:
            pass  # the writer's own error is raised
        except Exception as error:
            self.error = error
        self.cpu_s = time.thread_time()

    def _verify(self, handle: int) -> None:
        self._wait_for(len(self._plan.header))
        if os.pread(handle, len(self._plan.header), 0) != self._plan.header:
            raise CheckpointError(f"{self._path} does not contain the header that was written to it.")
        scratch = scratch_of_sums()
        for number, (piece, start) in enumerate(zip(self._plan.pieces, self._plan.starts, strict=True)):
            expected = piece.sums() if self._live is None else self._live[number]
            found = fingerprint.ZERO
            dtype = piece.data.dtype
            for step in steps_of(StoredBox(self._path.name, start, piece.offset, piece.shape), dtype, size=disk.STEP):
                self._wait_for(step.start + step.elements * dtype.itemsize)
                part = sums_on_disk(handle, step, whole=piece.whole, dtype=dtype, scratch=scratch)
                found = fingerprint.add(found, part)
            if found != expected:
                raise CheckpointError(
                    f"{self._path}: {piece.label} on disk differs from the model (fingerprint {fingerprint.text(found)} "
                    f"instead of {fingerprint.text(expected)})."
                )
            self.sums.append(expected)

    def _wait_for(self, size: int) -> None:
        while self._size < size:
            size_now = self.sizes.get()
            if size_now is None:
                raise _WriterStopped
            self._size = size_now
