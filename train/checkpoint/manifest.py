"""index.json: which file contains each part of a tensor. It is checked against the manifest (`recipes.schema.manifest`).

It is plain JSON. Its digest is in the manifest, and every number in it is checked against the files before use. A hostile or
damaged folder raises a CheckpointError with the file's name and the reason; no code from it is run.
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
MODEL, MASTER = "model.", "optimizer.master."
"""Prefixes of tensors: the model's weights, and the fp32 masters of weights that are not fp32 themselves."""
AVERAGE = "optimizer.ema."
"""Prefix of moving averages of the weights (`optim.ema_decay`)."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors' names of dtypes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor in a file: `offset` and `shape` in the whole tensor, `start` in bytes from the start of the file."""

    file: str
    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Index = dict[str, list[StoredBox]]
"""The stored boxes of each tensor; together they cover it exactly once."""


def index_text(index: Index) -> str:
    """The content of index.json."""
    files = sorted({stored.file for boxes in index.values() for stored in boxes})
    number = {name: i for i, name in enumerate(files)}
    pieces = {t: [[number[p.file], p.start, list(p.offset), list(p.shape)] for p in index[t]] for t in sorted(index)}
    return json.dumps({"files": files, "pieces": pieces}, separators=(",", ":"))


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Read index.json and check its digest, names, bounds in tensor and file, and each tensor's number of elements."""
    path = folder / INDEX
    content = read_text(path)
    if sha256(content) != manifest.index_sha256:
        raise CheckpointError(f"{path} is damaged: its content does not match the digest in {MANIFEST}.")
    index: Index = {}
    try:
        raw = json.loads(content)
        for tensor, record in manifest.tensors.items():
            index[tensor] = [
                _stored_box(raw["files"], piece, manifest, record) for piece in raw["pieces"].get(tensor, [])
            ]
            elements = sum(math.prod(stored.shape) for stored in index[tensor])
            if elements != math.prod(record.shape):
                raise ValueError(f"{tensor} has {math.prod(record.shape):,} elements, its parts {elements:,}")
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not describe the files in its folder: {error}") from error
    return index


def _stored_box(files: list[str], piece: Any, manifest: Manifest, record: TensorRecord) -> StoredBox:
    number, start, offset, shape = piece
    if not all(is_count(n) for n in (number, start, *offset, *shape)):
        raise ValueError(f"a part has impossible numbers: {str(piece)[:200]}")
    stored = StoredBox(files[number], start, tuple(offset), tuple(shape))
    if stored.file not in manifest.files:
        raise ValueError(f"{stored.file!r} is not a file of this checkpoint")
    ends = [o + s for o, s in zip(stored.offset, stored.shape, strict=True)]
    if any(end > size for end, size in zip(ends, record.shape, strict=True)):
        raise ValueError(f"a part reaches outside its tensor: {piece}, {record.shape}")
    size = math.prod(stored.shape) * DTYPE_BYTES[record.dtype]
    if start + size > manifest.files[stored.file]:
        raise ValueError(f"a part reaches outside {stored.file}: {piece}")
    return stored
