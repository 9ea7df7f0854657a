"""Hugging Face's weight files, `*.safetensors` with an index, read and written one tensor at a time.

    model.safetensors                                        if everything fits into one file
    model-00001-of-00003.safetensors ... model.safetensors.index.json

A file is eight bytes (length of the header, little endian), a JSON header of names, formats, shapes and byte ranges, then
the bytes (github.com/huggingface/safetensors, README). The package can only write a file from tensors that
are all in memory, so this module writes files itself, from a plan of shapes. It reads them with the package.
"""

import json
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from recipes.schema.errors import CheckpointError
from recipes.schema.foreign import open_regular, printable, read_json

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_DENSE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_QUANTIZED = {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
_CODES = _DENSE | _QUANTIZED
_MOST_INDEX_BYTES = 1 << 27
"""Size of the largest index that is read: a million tensors."""


@dataclass(frozen=True)
class Entry:
    """Name, shape and format of a stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The safetensors files of a directory. Opening reads headers only; CheckpointError names what is wrong.

    Pickles (`pytorch_model.bin`) are refused: opening one can run code. quantized: also accept the types of quantised weights.
    """

    def __init__(self, folder: Path, *, quantized: bool = False) -> None:
        supported = {code: dtype for dtype, code in (_CODES if quantized else _DENSE).items()}
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._file_of: dict[str, Path] = {}
        for path in self._paths():
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    shown = printable(name, most=100)
                    if name in self.entries:
                        raise CheckpointError(f"{folder}: {shown} is in {self._file_of[name].name} and in {path.name}.")
                    part = file.get_slice(name)
                    code = part.get_dtype()
                    if code not in supported:
                        raise CheckpointError(
                            f"{path}: {shown} is stored as {code}. Supported: {', '.join(supported)}."
                        )
                    self.entries[name] = Entry(name, tuple(part.get_shape()), supported[code])
                    self._file_of[name] = path
        self._check_index()

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, copied out of the mapped file, so that the file does not stay mapped."""
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name).clone()

    def _paths(self) -> list[Path]:
        if self._has_index():
            paths = [self.folder / name for name in sorted(set(self._weight_map().values()))]
        else:
            paths = sorted(self.folder.glob("*.safetensors"))
        if paths:
            return paths
        pickles = sorted(path.name for path in [*self.folder.glob("*.bin"), *self.folder.glob("*.pt")])
        if pickles:
            raise CheckpointError(
                f"{self.folder} has only pickles ({', '.join(pickles[:3])}), which can run code when opened. Convert "
                f"them to safetensors in a sandbox: transformers' `save_pretrained` writes them."
            )
        raise CheckpointError(f"{self.folder} has no *.safetensors.")

    def _has_index(self) -> bool:
        index = self.folder / INDEX
        return index.exists() or index.is_symlink()  # a pipe or a broken link too: reading it is an error

    def _weight_map(self) -> dict[str, str]:
        try:
            index = read_json(self.folder / INDEX, most_bytes=_MOST_INDEX_BYTES)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / INDEX} cannot be read: {error}. Copy the file again.") from error
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict):
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map. Copy the file again.")
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file or not file.isprintable() or file == "..":
                raise CheckpointError(
                    f"{self.folder / INDEX}: {printable(name, most=100)} is in {printable(repr(file), most=100)}, which is not "
                    f"a file of the directory."
                )
        return files

    def _check_index(self) -> None:
        if not self._has_index():
            return
        listed = self._weight_map()
        wrong = [name for name, file in listed.items() if self._file_of.get(name) != self.folder / file]
        wrong += [name for name in self.entries if name not in listed]
        if wrong:
            raise CheckpointError(
                f"{self.folder / INDEX} and the files disagree about {len(wrong)} tensors, e.g. "
                f"{printable(wrong[0], most=100)}: a file is missing or was replaced. Copy the directory again."
            )


class WeightWriter:
    """Writes a directory's weight files from a plan, tensor by tensor in the plan's order. Use as a context manager.

    No file has more than `file_bytes` of tensors, except for a single larger tensor.
    """

    def __init__(self, folder: Path, plan: Sequence[Entry], *, file_bytes: int) -> None:
        self.folder = folder
        self._files = _cut(plan, file_bytes)
        self._names = _file_names(len(self._files))
        self._stream: BinaryIO | None = None
        self._queue: Iterator[tuple[int, Entry]] = (
            (number, entry) for number, file in enumerate(self._files) for entry in file
        )
        self._next: tuple[int, Entry] | None = next(self._queue, None)
        self._open = -1

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of the plan, converted to the planned format."""
        assert self._next is not None, f"{name} comes after the end of the plan"
        number, entry = self._next
        assert (entry.name, entry.shape) == (name, tuple(tensor.shape)), f"{name} {tuple(tensor.shape)} is not {entry}"
        if number != self._open:
            self._start(number)
        assert self._stream is not None
        numbers = tensor.to(entry.dtype).contiguous().flatten().view(torch.uint8)
        self._stream.write(memoryview(numbers.numpy()))
        self._next = next(self._queue, None)

    def finish(self) -> None:
        """Close the last file and, if there are several, write the index."""
        assert self._next is None, f"{self._next} was never added"
        self._close()
        if len(self._files) > 1:
            places = zip(self._names, self._files, strict=True)
            index = {
                "metadata": {"total_size": sum(entry.nbytes for file in self._files for entry in file)},
                "weight_map": dict(sorted((entry.name, name) for name, file in places for entry in file)),
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> "WeightWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._close()

    def _start(self, number: int) -> None:
        self._close()
        self._open = number
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self._files[number]:
            header[entry.name] = {
                "dtype": _CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight
        self._stream = (self.folder / self._names[number]).open("wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _cut(plan: Sequence[Entry], file_bytes: int) -> list[list[Entry]]:
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in plan:
        if files[-1] and size + entry.nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return files


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [ONE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        open_regular(path).close()  # the library would wait for the writer of a pipe
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {printable(str(error), most=300)}. Copy the file again."
        ) from error
