"""Reads and writes a checkpoint's weights one whole tensor at a time, without building a model. Converters use it.

    StoredTensors(folder)            names, shapes, dtypes; read(name) -> the whole tensor, at any layout
    write_weights(folder, ...)       a checkpoint of weights only, tensor by tensor, that any layout can start from

Memory use is about one tensor. Nothing in a checkpoint is executed: it is JSON and safetensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.system import disk
from recipes.schema.errors import CheckpointError
from train.checkpoint.files import Reader, bytes_of, header_of, label_of, whole_tensor
from train.checkpoint.manifest import DTYPES

_SECTION = "model."
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

    def __init__(self, folder: Path) -> None:
        """CheckpointError if the manifest or index in `folder` is not valid."""
        self.folder = folder
        self._reader = Reader(folder)
        self.weights = {
            name.removeprefix(_SECTION): StoredTensor(record.shape, DTYPES[record.dtype])
            for name, record in self._reader.manifest.tensors.items()
            if name.startswith(_SECTION) and _PRECISION_STATE not in name
        }

    def read(self, name: str) -> torch.Tensor:
        """One whole weight, in its stored dtype."""
        return whole_tensor(self._reader, _SECTION + name)


def write_weights(folder: Path, weights: dict[str, StoredTensor], read: Callable[[str], torch.Tensor]) -> None:
    """Write the tensors `weights` of a checkpoint into an empty folder; `read` returns each when it is needed.

    `storage.publish` then adds the manifest. Tensors are written in the order of `weights`, wide dtypes first. Raises
    CheckpointError if the disk cannot be written.
    """
    names = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    entries = []
    for name in names:
        stored = weights[name]
        entries.append((label_of(_SECTION + name, [0] * len(stored.shape), stored.shape), stored.dtype, stored.shape))
    header, _ = header_of(entries)
    path = folder / "rank_00000.safetensors"

    try:
        disk.write_new(path, [header])
        for name in names:
            tensor = read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (weights[name].shape, weights[name].dtype), name
            disk.append(path, [bytes_of(tensor.contiguous())])
        disk.sync(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
