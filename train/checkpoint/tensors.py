"""The tensors of a checkpoint, whole and one at a time, without building a model: what converters read and write.

    StoredTensors(folder)            names, shapes, formats; read(name) -> the whole tensor, whatever layout wrote it
    write_weights(folder, ...)       a checkpoint of weights only, tensor by tensor, that any layout can start from

Memory stays near one tensor both ways. Nothing of a checkpoint is executed: its index is a pickle, read by an unpickler
that knows the few classes an index is made of; the tensors themselves torch reads with `weights_only`.
"""

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from train.errors import CheckpointError

_INDEX = ".metadata"
_MEGATRON = "metadata.json"
_PIECES = ("._extra_state", ".low_precision_")
_KNOWN = {
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "float8_e4m3fn"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}  # fmt: skip
"""What an index may name, by module."""


@dataclass(frozen=True)
class StoredTensor:
    """What a checkpoint's index says about a tensor."""

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
        """CheckpointError where `folder` has no index, or one that names what no index names."""
        self.folder = folder
        self._reader = _Reader(folder)
        stored = self._reader.index.state_dict_metadata
        self.weights = {
            name: StoredTensor(tuple(entry.size), entry.properties.dtype)
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
            and not name.startswith("optimizer.")
            and not any(piece in name for piece in _PIECES)
        }

    def read(self, name: str) -> torch.Tensor:
        """One whole weight, in the format it is stored in."""
        stored = self.weights[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        try:
            with _alone():
                dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except Exception as error:  # torch wraps what happens here in exceptions of its own
            raise CheckpointError(f"could not read {name} from {self.folder}: {error}") from error
        return tensor


def write_weights(folder: Path, weights: dict[str, StoredTensor], read: Callable[[str], torch.Tensor]) -> None:
    """Write a checkpoint of `weights` into an empty folder, in their order; `read` gives each when it is written.

    The result is what `storage.read_weights` takes; it holds no optimizer state. A manifest is not written here.
    """
    state: dict[str, Any] = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in weights.items()
    }
    state["common_state/shard_0_1"] = [{}]
    try:
        with _alone():
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(folder, sync_files=False),
                planner=_ReadWhenWritten(read),
                no_dist=True,
            )
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise first if isinstance(first, CheckpointError) else CheckpointError(f"{folder}: {first}") from error
    (folder / _MEGATRON).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that no process group is there: none is meant to be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Reader(dcp.FileSystemReader):
    """torch's reader with the index read once, by name and not by trust."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / _INDEX
        try:
            with path.open("rb") as stream:
                self.index: Metadata = _IndexUnpickler(stream).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read as the index of a checkpoint: {error}") from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does; nothing was executed")
        return super().find_class(module, name)


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Plans with empty tensors and fetches the numbers of each when its turn comes."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        tensor = self._read(write_item.index.fqn)
        assert (tensor.shape, tensor.dtype) == (object.shape, object.dtype), f"{write_item.index.fqn}: {tensor.shape}"
        return tensor
