"""The tensors of a checkpoint, whole and one at a time, without building a model: what converters read and write.

    StoredTensors(folder)            names, shapes, formats; read(name) -> the whole tensor, whatever layout wrote it
    write_weights(folder, ...)       a checkpoint of weights only, tensor by tensor, that any layout can start from

Memory stays near one tensor both ways. Nothing of a checkpoint is executed: it is JSON and safetensors.
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
_OWN_STATE = ".low_precision_"


@dataclass(frozen=True)
class StoredTensor:
    """What a checkpoint's manifest says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of its numbers."""
        return self.shape_numel * self.dtype.itemsize

    @property
    def shape_numel(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()


class StoredTensors:
    """A checkpoint's weights by name. Reading needs no process group and no model; it is not collective."""

    def __init__(self, folder: Path) -> None:
        """CheckpointError where the manifest or index in `folder` are not right."""
        self.folder = folder
        self._reader = Reader(folder)
        self.weights = {
            name.removeprefix(_SECTION): StoredTensor(record.shape, DTYPES[record.dtype])
            for name, record in self._reader.manifest.tensors.items()
            if name.startswith(_SECTION) and _OWN_STATE not in name
        }

    def read(self, name: str) -> torch.Tensor:
        """One whole weight, in the format it is stored in."""
        return whole_tensor(self._reader, _SECTION + name)


def write_weights(folder: Path, weights: dict[str, StoredTensor], read: Callable[[str], torch.Tensor]) -> None:
    """Write the tensors of a checkpoint of `weights` into an empty folder; `read` gives each when it is written.

    `storage.publish` then completes the checkpoint with its manifest. Tensors are written in the order of `weights`, wide
    formats first. Raises CheckpointError where the disk refuses.
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
