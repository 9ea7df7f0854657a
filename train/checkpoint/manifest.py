"""Where each part of a checkpoint's tensors lies: index.json, checked against the manifest (`recipes.schema.manifest`).

Plain JSON, guarded by the manifest's digest, and believed only after every number in it was checked against the files: a
reader of a hostile or damaged folder gets a CheckpointError with the file's name and the reason, and no code is run.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.schema.errors import CheckpointError
from recipes.schema.manifest import DTYPE_BYTES as DTYPE_BYTES
from recipes.schema.manifest import FORMAT as FORMAT
from recipes.schema.manifest import MANIFEST as MANIFEST
from recipes.schema.manifest import Manifest as Manifest
from recipes.schema.manifest import RunState as RunState
from recipes.schema.manifest import TensorRecord as TensorRecord
from recipes.schema.manifest import describe_layout as describe_layout
from recipes.schema.manifest import describe_not_finite as describe_not_finite
from recipes.schema.manifest import is_count, read_text
from recipes.schema.manifest import manifest_text as manifest_text
from recipes.schema.manifest import read_manifest as read_manifest
from recipes.schema.manifest import sha256 as sha256

INDEX = "index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors' names of number formats."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a box of a tensor lies: `offset` and `shape` in the whole tensor, `start` in bytes from the file's begin."""

    file: str
    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


Index = dict[str, list[Place]]
"""The parts of each tensor; together they are the tensor."""


def index_text(index: Index) -> str:
    """index.json of an index."""
    files = sorted({place.file for places in index.values() for place in places})
    number = {name: i for i, name in enumerate(files)}
    pieces = {t: [[number[p.file], p.start, list(p.offset), list(p.shape)] for p in index[t]] for t in sorted(index)}
    return json.dumps({"files": files, "pieces": pieces}, separators=(",", ":"))


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Where each tensor's parts lie, checked: digest, names, bounds in tensor and file, every element there once."""
    path = folder / INDEX
    content = read_text(path)
    if sha256(content) != manifest.index_sha256:
        raise CheckpointError(f"{path} is damaged: its content does not match the digest in {MANIFEST}.")
    index: Index = {}
    try:
        raw = json.loads(content)
        for tensor, record in manifest.tensors.items():
            index[tensor] = [_place(raw["files"], piece, manifest, record) for piece in raw["pieces"].get(tensor, [])]
            elements = sum(math.prod(place.shape) for place in index[tensor])
            if elements != math.prod(record.shape):
                raise ValueError(f"{tensor} has {math.prod(record.shape):,} elements, its parts {elements:,}")
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not describe the files beside it: {error}") from error
    return index


def _place(files: list[str], piece: Any, manifest: Manifest, record: TensorRecord) -> Place:
    number, start, offset, shape = piece
    if not all(is_count(n) for n in (number, start, *offset, *shape)):
        raise ValueError(f"a part has impossible numbers: {str(piece)[:200]}")
    place = Place(files[number], start, tuple(offset), tuple(shape))
    if place.file not in manifest.files:
        raise ValueError(f"{place.file!r} is not a file of this checkpoint")
    ends = [o + s for o, s in zip(place.offset, place.shape, strict=True)]
    if any(end > size for end, size in zip(ends, record.shape, strict=True)):
        raise ValueError(f"a part reaches outside its tensor: {piece}, {record.shape}")
    size = math.prod(place.shape) * DTYPE_BYTES[record.dtype]
    if start + size > manifest.files[place.file]:
        raise ValueError(f"a part reaches outside {place.file}: {piece}")
    return place
