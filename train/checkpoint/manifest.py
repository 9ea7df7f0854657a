"""What a checkpoint says about itself: manifest.json (for people and programs) and index.json (where each part lies).

Both are plain JSON, guarded by digests, and believed only after every number in them was checked against the files: a
reader of a hostile or damaged folder gets a CheckpointError with the file's name and the reason, and no code is run.
"""

import hashlib
import json
import math
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from recipes.schema.errors import CheckpointError
from train.checkpoint import fingerprint

FORMAT = 2
MANIFEST = "manifest.json"
INDEX = "index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors' names of number formats."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_REQUIRED = {"step", "position", "tokens", "layout", "recipe", "data_hash", "versions", "tensors"}
"""Keys of manifest.json that every version wrote: a file without one is not read with a default instead."""
_LARGEST = 1 << 62
_MOST_DIMENSIONS = 16
_LONGEST_NAME = 255
"""Bytes of a file's name (NAME_MAX)."""
_LONGEST_JSON = 1 << 30
"""Bytes; a longer one is no manifest or index of ours."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the whole model."""

    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]
    fingerprint: str
    """128 bits of the content, the same at any sharding (`train.checkpoint.fingerprint`)."""
    not_finite: int | None = None
    """How many elements are NaN or infinite; None in checkpoints that older versions wrote."""

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class RunState:
    """Where a run stands, tensors aside: what every save records of it. The defaults are those of weights nobody trained here."""

    step: int = 0
    """Optimizer steps finished."""
    position: int = 0
    """Rows consumed from the training stream."""
    tokens: int = 0
    """Tokens trained on."""
    layout: dict[str, int] = field(default_factory=dict)
    """Degrees it runs at. Informational: any layout can read the checkpoint."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe (`recipes.schema.read.recipe_mapping`); empty if unknown."""
    data_hash: str = ""
    """Hash of the data manifest the position refers to; empty if there is none."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer the model was trained with; empty if unknown."""
    kernels: str = ""
    """Form of the CPU kernels on all ranks (`train.native.forms`); empty if unknown, and off CPUs."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from, when not from training alone (JSON values): a pruned checkpoint's parent and what was kept."""


@dataclass(frozen=True)
class Manifest(RunState):
    """What a checkpoint says about itself."""

    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that wrote it."""
    updates: int | None = None
    """Adam's step count; None if there is no optimizer state: training then starts with fresh moments."""
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    """By name: `model.NAME`, `optimizer.master.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`, `random.NAME`."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of every other file of the checkpoint."""
    index_sha256: str = ""
    """Digest of index.json."""
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Size of the checkpoint on disk, the manifest aside."""
        return sum(self.files.values())

    @property
    def not_finite(self) -> dict[str, int]:
        """Tensors with NaN or infinity, and how many elements, as far as the manifest knows."""
        return {name: record.not_finite for name, record in self.tensors.items() if record.not_finite}

    @property
    def fingerprint(self) -> str:
        """128 bits over all weights: two checkpoints with the same weights have the same."""
        names = sorted(name for name in self.tensors if name.startswith("model."))
        told = "\n".join(
            f"{n} {self.tensors[n].dtype} {self.tensors[n].shape} {self.tensors[n].fingerprint}" for n in names
        )
        return hashlib.sha256(told.encode()).hexdigest()[:32]


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


def describe_not_finite(counts: dict[str, int]) -> str:
    """A few of the tensors with NaN or infinity by name: `3 tensors hold NaN or infinity: model.a (5 elements), ...`."""
    named = [f"{name} ({count:,} element{'s' * (count > 1)})" for name, count in sorted(counts.items())]
    few = ", ".join(named[:3]) + (f" and {len(named) - 3:,} more" if len(named) > 3 else "")
    return f"{len(named):,} tensor{'s hold' if len(named) > 1 else ' holds'} NaN or infinity: {few}"


Index = dict[str, list[Place]]
"""The parts of each tensor; together they are the tensor."""


def describe_layout(layout: dict[str, int]) -> str:
    """Degrees of a manifest in one short line, as `Layout.describe` gives them; `no run` where no run wrote it."""
    names = (("TP", "tensor", 0), ("PP", "pipeline", 0), ("VP", "virtual", 1), ("CP", "context", 1), ("DP", "data", 0))
    parts = [f"{short}{layout[key]}" for short, key, least in names if layout.get(key, 0) > least]
    return " ".join(parts) or "no run"


def manifest_text(manifest: Manifest) -> str:
    """manifest.json of a manifest."""
    body = asdict(manifest)
    return json.dumps(body | {"digest": _digest(body)}, indent=1)


def index_text(index: Index) -> str:
    """index.json of an index."""
    files = sorted({place.file for places in index.values() for place in places})
    number = {name: i for i, name in enumerate(files)}
    pieces = {t: [[number[p.file], p.start, list(p.offset), list(p.shape)] for p in index[t]] for t in sorted(index)}
    return json.dumps({"files": files, "pieces": pieces}, separators=(",", ":"))


def sha256(content: str) -> str:
    """Digest of a text."""
    return hashlib.sha256(content.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, with its digest and the sizes of all files checked. CheckpointError says what is wrong."""
    path = folder / MANIFEST
    raw = _read_json(path)
    if not isinstance(raw, dict) or type(raw.get("format")) is not int:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint: it names no format.")
    if raw["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {raw['format']}; this version reads format {FORMAT}. Use the version of this "
            f"project that wrote it."
        )
    digest = raw.pop("digest", None)
    if digest != _digest(raw):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest.")
    try:
        if missing := _REQUIRED - raw.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        tensors = {name: _record(name, value) for name, value in raw["tensors"].items()}
        manifest = replace(Manifest(**(raw | {"tensors": {}})), tensors=tensors)
        _check_types(manifest)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint manifest: {error}") from error
    for name, size in manifest.files.items():
        file = folder / name
        try:
            found = file.stat().st_size if file.is_file() else None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        if found != size:
            raise CheckpointError(
                f"{file} is {'missing' if found is None else f'{found:,} bytes long'}, the manifest says {size:,} bytes."
                f" The checkpoint is damaged: remove {folder} to resume from an older one."
            )
    return manifest


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Where each tensor's parts lie, checked: digest, names, bounds in tensor and file, every element there once."""
    path = folder / INDEX
    content = _read_text(path)
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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_text(path: Path) -> str:
    """What is in a file, unless it is a pipe, a device or far too long, which would hold the reader for ever."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LONGEST_JSON:
            raise CheckpointError(f"{path} cannot be read: it is no file, or {found.st_size:,} bytes long.")
        return path.read_text()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _digest(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")))


def _record(name: str, value: Any) -> TensorRecord:
    if not name.isprintable():
        raise ValueError(f"{name!r} is no name of a tensor")
    shape = tuple(value["shape"])
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of unknown format {value['dtype']!r}")
    if not all(_is_count(n) for n in shape) or math.prod(shape) > _LARGEST or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has the impossible shape {str(shape)[:80]}")
    fingerprint.from_text(value["fingerprint"])
    not_finite = value.get("not_finite")
    if not_finite is not None and not (_is_count(not_finite) and not_finite <= math.prod(shape)):
        raise ValueError(f"{name} has {not_finite!r} elements that are not finite, of {math.prod(shape):,}")
    return TensorRecord(value["dtype"], shape, value["fingerprint"], not_finite)


def _check_types(manifest: Manifest) -> None:
    for key in ("step", "position", "tokens"):
        if not _is_count(getattr(manifest, key)):
            raise ValueError(f"{key} is {getattr(manifest, key)!r}, not a count")
    if manifest.updates is not None and not _is_count(manifest.updates):
        raise ValueError(f"updates is {manifest.updates!r}, not a count")
    for key in ("data_hash", "tokenizer", "kernels", "index_sha256"):
        if not isinstance(getattr(manifest, key), str):
            raise ValueError(f"{key} is {getattr(manifest, key)!r}, not a text")
    for key in ("layout", "recipe", "versions", "lineage", "files"):
        if not isinstance(getattr(manifest, key), dict):
            raise ValueError(f"{key} is not a mapping")
    for degree, count in manifest.layout.items():
        if not _is_count(count):
            raise ValueError(f"layout.{degree} is {count!r}, not a count")
    for group in ("run", "model"):
        if not isinstance(manifest.recipe.get(group, {}), dict):
            raise ValueError(f"recipe.{group} is not a mapping")
    teacher = manifest.lineage.get("teacher")
    if teacher is not None:
        said = teacher if isinstance(teacher, dict) else {}
        if not all(isinstance(said.get(key), str) for key in ("checkpoint", "fingerprint")):
            raise ValueError(f"lineage.teacher is {str(teacher)[:80]!r}, not a checkpoint and its fingerprint")
    for name, size in manifest.files.items():
        is_plain = name == Path(name).name and name not in ("", ".", "..") and name.isprintable()
        if not is_plain or len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"{name[:_LONGEST_NAME]!r} is no plain file name")
        if not _is_count(size):
            raise ValueError(f"{name} is said to be {size!r} bytes long")


def _is_count(value: Any) -> bool:
    """A whole number from 0 on that fits 64 bits (JSON's `true` is none, nor is 1.0)."""
    return type(value) is int and 0 <= value <= _LARGEST


def _place(files: list[str], piece: Any, manifest: Manifest, record: TensorRecord) -> Place:
    number, start, offset, shape = piece
    if not all(_is_count(n) for n in (number, start, *offset, *shape)):
        raise ValueError(f"a part has impossible numbers: {str(piece)[:200]}")
    place = Place(files[number], start, tuple(offset), tuple(shape))
    if place.file not in manifest.files:
        raise ValueError(f"{place.file!r} is not a file of this checkpoint")
    ends = [o + s for o, s in zip(place.offset, place.shape, strict=True)]
    if any(end > size for end, size in zip(ends, record.shape, strict=True)):
        raise ValueError(f"a part reaches outside its tensor: {piece}, {record.shape}")
    size = math.prod(place.shape) * DTYPES[record.dtype].itemsize
    if start + size > manifest.files[place.file]:
        raise ValueError(f"a part reaches outside {place.file}: {piece}")
    return place
