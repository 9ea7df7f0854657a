"""The files of a checkpoint: one safetensors file for each writing rank. Reads any box of any tensor from them.

    rank_00003.safetensors:   model.output_layer.weight[128:256,0:64]   optimizer.exp_avg....[0:17,0:64]   ...

Each file is ordinary safetensors (8 bytes of header length, a JSON header, the data). The name of an entry gives the tensor and
the box. Readers use index.json, which has the same information for all files.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.schema.errors import CheckpointError
from recipes.schema.foreign import printable
from train.checkpoint import fingerprint
from train.checkpoint.fingerprint import Sums
from train.checkpoint.manifest import (
    DTYPE_NAMES,
    DTYPES,
    Index,
    Manifest,
    StoredBox,
    TensorRecord,
    read_index,
    read_manifest,
)

_CHUNK = 1 << 20
"""Bytes per read when data cannot be read directly into the target."""
_ALIGN = 64
"""Data in a file start at a multiple of this many bytes."""
_LONGEST_HEADER = 1 << 30
_LABEL = re.compile(r"(?P<tensor>[^\[\]]+)\[(?P<box>(\d{1,18}:\d{1,18}(,\d{1,18}:\d{1,18})*)?)\]")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in this process's memory."""

    tensor: str
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    data: torch.Tensor
    """The box's elements in order; contiguous, of any shape."""

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    @property
    def label(self) -> str:
        """Name in a file: which box of which tensor."""
        return label_of(self.tensor, self.offset, self.shape)

    def sums(self, copy_to: int | None = None) -> Sums:
        """The piece's contribution to its tensor's fingerprint. copy_to: see `fingerprint.of_box`."""
        return fingerprint.of_box(self.data, whole=self.whole, offset=self.offset, shape=self.shape, copy_to=copy_to)


def header_of(
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """A safetensors header for contiguous tensors, and the byte in the file at which each starts.

    entries: label, format and shape of each.
    """
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at, relative = 0, []
    for label, dtype, shape in entries:
        end = at + math.prod(shape) * dtype.itemsize
        relative.append(at)
        table[label] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + start for start in relative]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file and the byte at which its data start. CheckpointError if it is not safetensors."""
    size = path.stat().st_size if path.is_file() else 0
    with opened(path) as handle:
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file: its header would be {length:,} bytes long.")
        text = os.pread(handle, length, 8)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        for label, entry in entries.items():
            _check_entry(label, entry, data_bytes=size - 8 - length)
        return entries, 8 + length
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _check_entry(label: str, entry: Any, *, data_bytes: int) -> None:
    """ValueError if an entry of a header does not describe bytes of the file's data."""
    try:
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [start, stop, *shape]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its entry {printable(label, most=100)!r} lacks or misstates a field") from error
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"its entry {printable(label, most=100)!r} has numbers that are not sizes")
    if not start <= stop <= data_bytes or math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"its entry {printable(label, most=100)!r} does not fit the file's data")


def scan(folder: Path) -> tuple[Index, dict[str, TensorRecord]]:
    """Index and tensor records of a folder, from its files' headers and data. Raises CheckpointError, like `read_header`."""
    index: Index = {}
    dtypes: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        entries, begin = read_header(path)
        for label, entry in entries.items():
            found = _LABEL.fullmatch(label)
            if found is None:
                raise CheckpointError(f"{path} contains {label!r}, which is not a TENSOR[START:END,...] name.")
            offset = tuple(int(span.split(":")[0]) for span in found["box"].split(",") if span)
            if len(offset) != len(entry["shape"]) or label != label_of(found["tensor"], offset, entry["shape"]):
                raise CheckpointError(f"{path} contains {label!r}, which does not fit its shape {entry['shape']}.")
            others = index.get(found["tensor"], [])
            if others and (len(others[0].shape), dtypes[found["tensor"]]) != (len(offset), entry["dtype"]):
                raise CheckpointError(f"{path} contains {label!r}, which does not fit the tensor's other parts.")
            stored = StoredBox(path.name, begin + entry["data_offsets"][0], offset, tuple(entry["shape"]))
            index.setdefault(found["tensor"], []).append(stored)
            dtypes[found["tensor"]] = entry["dtype"]
    records = {}
    for tensor, boxes in index.items():
        ends = [[o + s for o, s in zip(p.offset, p.shape, strict=True)] for p in boxes]
        whole = tuple(max(column) for column in zip(*ends, strict=True))
        total = fingerprint.ZERO
        for stored in boxes:
            total = fingerprint.add(total, _sums_of(folder, stored, whole=whole, dtype=DTYPES[dtypes[tensor]]))
        records[tensor] = TensorRecord(dtypes[tensor], whole, fingerprint.text(total), total.not_finite)
    return index, records


def label_of(tensor: str, offset: Sequence[int], shape: Sequence[int]) -> str:
    """Name of a box of a tensor in a file."""
    return f"{tensor}[{','.join(f'{o}:{o + s}' for o, s in zip(offset, shape, strict=True))}]"


def bytes_of(data: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(data.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading. An OSError becomes a CheckpointError that names the file."""
    with _named(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            yield handle
        finally:
            os.close(handle)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class Reader:
    """Reads boxes of the tensors of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the manifest or index is not valid."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.index: Index = read_index(folder, self.manifest)
        self._files: ExitStack | None = None
        self._last: tuple[str, int] | None = None

    def read(self, tensor: str, *, offset: Sequence[int], into: torch.Tensor) -> None:
        """Fill `into` with the box of its shape at `offset`, converted to its dtype. into: contiguous, on any device."""
        dtype = DTYPES[self.manifest.tensors[tensor].dtype]
        for stored, box in self._overlaps(tensor, offset, into.shape):
            target = into[tuple(slice(s.start - o, s.stop - o) for s, o in zip(box, offset, strict=True))]
            part = [slice(s.start - o, s.stop - o) for s, o in zip(box, stored.offset, strict=True)]
            with self._handle(stored.file) as handle:
                _read_part(handle, stored, part, dtype=dtype, target=target)

    def position(self, tensor: str, *, offset: Sequence[int], shape: Sequence[int]) -> tuple[str, int]:
        """File and byte at which this box starts. Reading boxes in this order reads each file sequentially."""
        width = DTYPES[self.manifest.tensors[tensor].dtype].itemsize
        starts = []
        for stored, box in self._overlaps(tensor, offset, shape):
            rows = box[0].start - stored.offset[0] if box else 0
            starts.append((stored.file, stored.start + rows * math.prod(stored.shape[1:]) * width))
        return min(starts, default=("", 0))

    @contextmanager
    def files_kept_open(self) -> Iterator[None]:
        """Keep a file open until another one is read, so that the kernel's read-ahead sees sequential reads."""
        try:
            with ExitStack() as self._files:
                yield
        finally:
            self._files = self._last = None

    @contextmanager
    def _handle(self, file: str) -> Iterator[int]:
        path = self.folder / file
        if self._files is None:
            with opened(path) as handle:
                yield handle
            return
        if self._last is None or self._last[0] != file:
            self._files.close()
            self._last = file, self._files.enter_context(opened(path))
        with _named(path):
            yield self._last[1]

    def _overlaps(
        self, tensor: str, offset: Sequence[int], shape: Sequence[int]
    ) -> Iterator[tuple[StoredBox, list[slice]]]:
        """Stored boxes that overlap a box, and each overlap in coordinates of the whole tensor."""
        for stored in self.index[tensor]:
            low = [max(a, b) for a, b in zip(stored.offset, offset, strict=True)]
            high = [min(o + n, p + m) for o, n, p, m in zip(stored.offset, stored.shape, offset, shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                yield stored, [slice(a, b) for a, b in zip(low, high, strict=True)]

    def empty(self, tensor: str, shape: Sequence[int]) -> torch.Tensor:
        """Uninitialised memory for a box of a tensor, in the dtype it is stored in."""
        return torch.empty(tuple(shape), dtype=DTYPES[self.manifest.tensors[tensor].dtype])

    def sums(self, tensor: str) -> Sums:
        """The fingerprint of a tensor, from the bytes on disk."""
        record = self.manifest.tensors[tensor]
        total = fingerprint.ZERO
        for stored in self.index[tensor]:
            total = fingerprint.add(
                total, _sums_of(self.folder, stored, whole=record.shape, dtype=DTYPES[record.dtype])
            )
        return total


def _read_part(handle: int, stored: StoredBox, part: list[slice], *, dtype: torch.dtype, target: torch.Tensor) -> None:
    """Read `part` of a stored box into `target`: directly if both are contiguous, otherwise block by block."""
    if not part:  # a scalar: read it as one row of one element
        part, stored, target = [slice(0, 1)], StoredBox(stored.file, stored.start, (0,), (1,)), target.reshape(1)
    row_elements = math.prod(stored.shape[1:])
    row_bytes = row_elements * dtype.itemsize
    first, last = part[0].start, part[0].stop
    inner_whole = all(s.start == 0 and s.stop == n for s, n in zip(part[1:], stored.shape[1:], strict=True))
    direct = inner_whole and target.is_contiguous() and target.dtype == dtype and target.device.type == "cpu"
    if direct:
        _read_exactly(handle, bytes_of(target), stored.start + first * row_bytes)
        return
    step = max(1, _CHUNK // max(1, row_bytes))
    scratch = torch.empty(min(step, last - first), row_elements, dtype=dtype)
    for row in range(first, last, step):
        rows = scratch[: min(step, last - row)]
        _read_exactly(handle, bytes_of(rows), stored.start + row * row_bytes)
        box = rows.reshape(len(rows), *stored.shape[1:])[(slice(None), *part[1:])]
        target[row - first : row - first + len(rows)].copy_(box)


def _sums_of(folder: Path, stored: StoredBox, *, whole: Sequence[int], dtype: torch.dtype) -> Sums:
    """Fingerprint of a stored box of any size."""
    with opened(folder / stored.file) as handle:
        return sums_on_disk(handle, stored, whole=whole, dtype=dtype, scratch=scratch_of_sums())


def scratch_of_sums() -> torch.Tensor:
    """A reusable buffer for fingerprinting stored boxes: its pages are already mapped, and it stays in the CPU cache."""
    return torch.empty(_CHUNK, dtype=torch.uint8)


def sums_on_disk(
    handle: int, stored: StoredBox, *, whole: Sequence[int], dtype: torch.dtype, scratch: torch.Tensor
) -> Sums:
    """Fingerprint of a stored box of any size, read through the buffer `scratch`. Raises OSError."""
    sums = fingerprint.of_stored_box(
        handle, stored.start, dtype=dtype, whole=whole, offset=stored.offset, shape=stored.shape, scratch=scratch
    )
    if sums is not None:
        return sums
    total = fingerprint.ZERO
    for step in steps_of(stored, dtype, size=scratch.numel()):
        data = torch.empty(step.shape, dtype=dtype)
        _read_exactly(handle, bytes_of(data), step.start)
        part = fingerprint.of_box(data, whole=whole, offset=step.offset, shape=step.shape)
        total = fingerprint.add(total, part)
    return total


def steps_of(stored: StoredBox, dtype: torch.dtype, *, size: int) -> Iterator[StoredBox]:
    """A stored box split into blocks of rows of about `size` bytes, in file order."""
    if not stored.shape:
        yield stored
        return
    row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
    step = max(1, size // max(1, row_bytes))
    for row in range(0, stored.shape[0], step):
        count = min(step, stored.shape[0] - row)
        offset, shape = (stored.offset[0] + row, *stored.offset[1:]), (count, *stored.shape[1:])
        yield StoredBox(stored.file, stored.start + row * row_bytes, offset, shape)


def _read_exactly(handle: int, into: memoryview, start: int) -> None:
    done = 0
    while done < len(into):
        got = os.preadv(handle, [into[done:]], start + done)
        if not got:
            raise OSError(f"the file ends {len(into) - done:,} bytes too early")
        done += got


def whole_tensor(reader: Reader, tensor: str) -> torch.Tensor:
    """A whole tensor of a checkpoint, in its stored dtype."""
    record = reader.manifest.tensors[tensor]
    values = torch.empty(record.shape, dtype=DTYPES[record.dtype])
    reader.read(tensor, offset=[0] * len(record.shape), into=values)
    return values


def boxes_of_range(
    shape: Sequence[int], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Split elements [start, end) of a flattened box into boxes, in order: (offset, shape, first element) of each.

    A range of a matrix gives at most three boxes: the end of a row, whole rows, the start of a row.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,), start) if shape else ((), (), 0)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), end // inner
    if first > last:  # inside one row
        yield from _inside(shape, start // inner, start, end)
        return
    if start < first * inner:
        yield from _inside(shape, first - 1, start, first * inner)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]), first * inner
    if last * inner < end:
        yield from _inside(shape, last, last * inner, end)


def _inside(
    shape: Sequence[int], row: int, start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    inner = math.prod(shape[1:])
    for offset, box, first in boxes_of_range(shape[1:], start - row * inner, end - row * inner):
        yield (row, *offset), (1, *box), first + row * inner
