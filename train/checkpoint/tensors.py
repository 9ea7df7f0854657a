"""Reads and writes a checkpoint's weights one whole tensor at a time, without building a model. Converters use it.

    StoredTensors(folder)            names, shapes, dtypes; read(name) -> the whole tensor, at any layout
    read_rows(name, first, into)     some rows of it, in fp32; verify(name): whether it is what was saved
    write_weights(folder, ...)       a checkpoint of weights only, tensor by tensor, that any layout can start from

Memory use is about one tensor, or one block of rows. Nothing in a checkpoint is executed: it is JSON and safetensors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.system import disk
from recipes.schema.errors import CheckpointError
from train.checkpoint import fingerprint
from train.checkpoint.files import Reader, bytes_of, header_of, label_of, whole_tensor
from train.checkpoint.manifest import AVERAGE, DTYPES, MASTER, MODEL

_PRECISION_STATE = ".low_precision_"


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor, from a checkpoint's manifest."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.shape_numel * self.dtype.itemsize

    @property
    def shape_numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class StoredTensors:
    """A checkpoint's weights by name. Reading needs no process group and no model; it is not collective."""

    def __init__(self, folder: Path, *, averaged: bool = False) -> None:
        """averaged: `read_rows` and `verify` are of the moving averages (`optim.ema_decay`) of trained weights.

        CheckpointError if the manifest or index in `folder` is not valid, or has no averages.
        """
        self.folder = folder
        self._precise = (AVERAGE, MASTER) if averaged else (MASTER,)
        self._reader = Reader(folder)
        self.weights = {
            name.removeprefix(MODEL): StoredTensor(record.shape, DTYPES[record.dtype])
            for name, record in self._reader.manifest.tensors.items()
            if name.startswith(MODEL) and _PRECISION_STATE not in name
        }
        if averaged and not any(name.startswith(AVERAGE) for name in self._reader.manifest.tensors):
            raise CheckpointError(
                f"{folder} has no moving average of its weights ({AVERAGE}*). Train with optim.ema_decay, such as 0.999, or "
                f"average the checkpoints of a run: stratum merge RUN --window FROM:TO --out NEW."
            )

    def read(self, name: str) -> torch.Tensor:
        """One whole weight, in its stored dtype."""
        return whole_tensor(self._reader, MODEL + name)

    def read_rows(self, name: str, first: int, into: torch.Tensor) -> None:
        """Fill fp32 `into` with the rows of a weight from row `first` on; a scalar has no rows and is read whole.

        Reads the optimizer's fp32 master if the checkpoint has one: a weight stored as bf16 is its rounding.
        """
        offset = [first, *[0] * (into.dim() - 1)][: into.dim()]
        self._reader.read(self._most_precise(name), offset=offset, into=into)

    def verify(self, name: str) -> None:
        """CheckpointError if what `read_rows` would read of a weight is not what was saved."""
        source = self._most_precise(name)
        found = fingerprint.text(self._reader.sums(source))
        if found != self._reader.manifest.tensors[source].fingerprint:
            raise CheckpointError(
                f"{self.folder} is damaged: {source} is not what was saved. `stratum checkpoint verify {self.folder}` names "
                f"the files."
            )

    def _most_precise(self, name: str) -> str:
        stored = self._reader.manifest.tensors
        return next((prefix + name for prefix in self._precise if prefix + name in stored), MODEL + name)


def write_weights(folder: Path, weights: dict[str, StoredTensor], read: Callable[[str], torch.Tensor]) -> None:
    """Write the tensors `weights` of a checkpoint into an empty folder; `read` returns each when it is needed.

    `storage.publish` then adds the manifest. Tensors are written in the order of `weights`, wide dtypes first. Raises
    CheckpointError if the disk cannot be written.
    """

    def whole(name: str) -> Iterable[torch.Tensor]:
        tensor = read(name)
        assert tuple(tensor.shape) == weights[name].shape, name
        return [tensor]

    write_weights_in_blocks(folder, weights, whole)


def write_weights_in_blocks(
    folder: Path, weights: dict[str, StoredTensor], read: Callable[[str], Iterable[torch.Tensor]]
) -> None:
    """As `write_weights`; `read` returns each tensor as blocks of rows, one after the other, so that none need be whole."""
    names = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    entries = []
    for name in names:
        stored = weights[name]
        entries.append((label_of(MODEL + name, [0] * len(stored.shape), stored.shape), stored.dtype, stored.shape))
    header, _ = header_of(entries)
    path = folder / "rank_00000.safetensors"

    try:
        disk.write_new(path, [header])
        for name in names:
            elements = 0
            for block in read(name):
                assert block.dtype == weights[name].dtype, name
                elements += block.numel()
                disk.append(path, [bytes_of(block.contiguous())])
            assert elements == weights[name].shape_numel, name
        disk.sync(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
