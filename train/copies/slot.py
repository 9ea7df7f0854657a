"""Memory for one generation of one rank's copy: `rank_00003.0`, and when the copy is complete, `rank_00003.0.json`.

The first is a safetensors file, mapped into memory and overwritten in place by each copy. All its memory is allocated when it is
opened: a full tmpfs is then an error at once, not a SIGBUS during a copy. The second makes the copy valid: it is deleted before
the bytes change and written last, atomically. It contains what a checkpoint's manifest says about the run, and a fingerprint of
every piece.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data.system import disk
from recipes.schema.errors import CheckpointError
from recipes.schema.foreign import read_json
from recipes.schema.manifest import manifest_from
from train.checkpoint import fingerprint
from train.checkpoint.files import read_header
from train.checkpoint.fingerprint import Sums
from train.checkpoint.manifest import DTYPES, Manifest

GENERATIONS = 2
"""Copies of each rank: while one is overwritten, the other is complete."""
_MOST_RECORD_BYTES = 1 << 28
_NAME = re.compile(r"(rank_(\d{5,9})\.([01]))(\.json)?")
_SUMS = fingerprint.LANES + 1


@dataclass(frozen=True)
class Record:
    """What makes a copy valid."""

    rank: int
    token: str
    """The run's (`train.copies.place`)."""
    attempt: str
    """Random text of the start of the run that made it. Copies of two starts are never mixed."""
    manifest: Manifest
    """Step, position, layout, recipe, lineage; without tensors and files."""
    header_sha256: str
    """Digest of the file's header: names, formats and shapes of the pieces."""
    size: int
    """Bytes of the file."""
    sums: Sequence[Sums]
    """Fingerprint of each piece, in the order of the file."""

    def text(self) -> str:
        """The content of the record's file, with its digest."""
        numbers = fingerprint.to_tensor(list(self.sums)).numpy().tobytes().hex()
        body = json.dumps({**self.__dict__, "manifest": asdict(self.manifest), "sums": numbers})
        return json.dumps({"body": body, "sha256": digest(body.encode())})


def digest(content: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def record_from(path: Path) -> Record:
    """Read a record. CheckpointError if it is not what was written."""
    try:
        outer = read_json(path, most_bytes=_MOST_RECORD_BYTES)
        if digest(outer["body"].encode()) != outer["sha256"]:
            raise ValueError("its content does not match its digest")
        fields = json.loads(outer["body"])
        numbers = torch.frombuffer(bytearray.fromhex(fields["sums"]), dtype=torch.int64).reshape(-1, _SUMS)
        read = {"manifest": manifest_from(fields["manifest"]), "sums": fingerprint.from_tensor(numbers)}
        return Record(**(fields | read))
    except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the record of a copy: {error}") from error


def slots_in(folder: Path, rank: int | None = None) -> "list[Slot]":
    """The slots of a rank, both generations; rank=None: every slot of which the folder has a file."""
    if rank is not None:
        return [Slot(folder, rank, generation) for generation in range(GENERATIONS)]
    names = [_NAME.fullmatch(path.name) for path in sorted(folder.iterdir())]
    slots = {name[1]: Slot(folder, int(name[2]), int(name[3])) for name in names if name is not None}
    return list(slots.values())


class Slot:
    """One generation of one rank's copy, in this node's memory."""

    def __init__(self, folder: Path, rank: int, generation: int) -> None:
        self.rank, self.generation = rank, generation
        self.path = folder / f"rank_{rank:05d}.{generation}"
        self.record_path = self.path.with_name(f"{self.path.name}.json")
        self._buffer: torch.Tensor | None = None

    def read(self) -> Record | None:
        """The record of a complete copy; None without one. CheckpointError if record or size are not right."""
        if not os.path.lexists(self.record_path):
            return None
        record = record_from(self.record_path)
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != record.size:
            raise CheckpointError(f"{self.path} has {size:,} bytes, its record says {record.size:,}")
        return record

    def buffer(self, size: int) -> torch.Tensor:
        """[size] uint8: the file's memory, to read, or to write after `invalidate`. Raises OSError if there is not enough."""
        if self._buffer is None or self._buffer.numel() != size:
            self._buffer = None
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(handle).st_size > size:
                    os.ftruncate(handle, size)
                os.posix_fallocate(handle, 0, size)
                mapped = mmap.mmap(handle, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(handle)
            self._buffer = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._buffer

    def invalidate(self) -> None:
        """The copy is about to change."""
        with contextlib.suppress(FileNotFoundError):
            disk.remove(self.record_path)

    def publish(self, text: str) -> None:
        """The copy is complete. Raises OSError."""
        disk.write_text(self.record_path, text)

    def remove(self) -> None:
        """Delete the copy and free its memory."""
        self._buffer = None
        for path in (self.record_path, self.path):
            with contextlib.suppress(OSError):
                disk.remove(path)

    def values(self, record: Record) -> dict[str, tuple[torch.Tensor, Sums]]:
        """Values and fingerprint of each piece by label, from a complete copy. CheckpointError if the header is not the one
        that was written."""
        entries, start = read_header(self.path)
        buffer = self.buffer(record.size)
        header = buffer[:start].numpy().tobytes()
        if digest(header) != record.header_sha256 or len(entries) != len(record.sums):
            raise CheckpointError(f"{self.path} is damaged: its header is not the one that was written")
        found = {}
        for (label, entry), sums in zip(entries.items(), record.sums, strict=True):
            low, high = (start + at for at in entry["data_offsets"])
            found[label] = (buffer[low:high].view(DTYPES[entry["dtype"]]).view(entry["shape"]), sums)
        return found
