"""manifest.json of a checkpoint, for people and programs.

It is plain JSON with a digest. Every number in it is checked before use: a hostile or damaged folder gives a CheckpointError
with the file's name and the reason, and no code is run. It is read here, below `data`, `launch` and `train`, because a plan must
check a teacher, a start or a resume without torch. index.json says where each part of a tensor is stored; only the trainer reads
it (`train.checkpoint.manifest`).
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.schema.errors import CheckpointError
from recipes.schema.foreign import read_bounded_text
from recipes.schema.ledger import Ledger, ledger_of

FORMAT = 2
MANIFEST = "manifest.json"

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1,
    "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of one number in each of safetensors' formats."""
_REQUIRED = {"step", "position", "tokens", "layout", "recipe", "data_hash", "versions", "tensors"}
"""Keys of manifest.json that every version wrote. A file without one is refused, not read with a default."""
LARGEST = 1 << 62
_MOST_DIMENSIONS = 16
_LONGEST_NAME = 255
"""Bytes of a file's name (NAME_MAX)."""
_LONGEST_JSON = 1 << 30
"""Bytes. No manifest or index that this project writes is longer."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the whole model."""

    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]
    fingerprint: str
    """128 bits of the content, the same for any sharding (`train.checkpoint.fingerprint`)."""
    not_finite: int | None = None
    """Number of elements that are NaN or infinite; None in checkpoints of older versions."""

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class RunState:
    """What every save records about its run, in addition to tensors. The defaults are for weights that were not trained here."""

    step: int = 0
    """Number of finished optimizer steps."""
    position: int = 0
    """Number of rows read from the training stream; of GRPO, number of prompts drawn."""
    tokens: int = 0
    """Number of tokens trained on."""
    layout: dict[str, int] = field(default_factory=dict)
    """Degrees of parallelism. For information only: any layout can read the checkpoint."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe (`recipes.schema.read.recipe_mapping`); empty if unknown."""
    data_hash: str = ""
    """Hash of the data manifest that the position refers to; empty without one."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer the model was trained with; empty if unknown."""
    kernels: str = ""
    """Form of the CPU kernels on all ranks (`train.native.kernel_versions`); empty if unknown or on a GPU."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Origin of weights that do not come from training alone (JSON values): e.g. a pruned checkpoint's parent and kept
    channels."""
    ledger: Ledger = field(default_factory=Ledger)
    """Steps and rows that the run left out because of spikes."""


@dataclass(frozen=True)
class Manifest(RunState):
    """The content of manifest.json."""

    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that wrote it."""
    updates: int | None = None
    """Adam's step count; None without optimizer state. Training then starts with zero moments."""
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    """Tensors by name: `model.NAME`, `optimizer.master.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`,
    `optimizer.ema.NAME`, `random.NAME`, `stream.NAME`."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of every other file of the checkpoint."""
    index_sha256: str = ""
    """Digest of index.json."""
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Size of the checkpoint on disk, without the manifest."""
        return sum(self.files.values())

    @property
    def not_finite(self) -> dict[str, int]:
        """{tensor with NaN or infinity: number of such elements}, as far as the manifest records it."""
        return {name: record.not_finite for name, record in self.tensors.items() if record.not_finite}

    @property
    def fingerprint(self) -> str:
        """128 bits over all weights. Checkpoints with the same weights have the same fingerprint."""
        names = sorted(name for name in self.tensors if name.startswith("model."))
        described = "\n".join(
            f"{n} {self.tensors[n].dtype} {self.tensors[n].shape} {self.tensors[n].fingerprint}" for n in names
        )
        return hashlib.sha256(described.encode()).hexdigest()[:32]


def describe_layout(layout: dict[str, int]) -> str:
    """Degrees of a manifest in one short line, as from `Layout.describe`; `no run` if no run wrote it."""
    names = (("TP", "tensor", 0), ("PP", "pipeline", 0), ("VP", "virtual", 1), ("CP", "context", 1), ("DP", "data", 0))
    parts = [f"{short}{layout[key]}" for short, key, least in names if layout.get(key, 0) > least]
    return " ".join(parts) or "no run"


def describe_not_finite(counts: dict[str, int]) -> str:
    """Names of some tensors with NaN or infinity: `3 tensors contain NaN or infinity: model.a (5 elements), ...`."""
    named = [f"{name} ({count:,} element{'s' * (count > 1)})" for name, count in sorted(counts.items())]
    few = ", ".join(named[:3]) + (f" and {len(named) - 3:,} more" if len(named) > 3 else "")
    return f"{len(named):,} tensor{'s contain' if len(named) > 1 else ' contains'} NaN or infinity: {few}"


def manifest_text(manifest: Manifest) -> str:
    """The text of manifest.json, with its digest."""
    body = asdict(manifest)
    return json.dumps(body | {"digest": _digest(body)}, indent=1)


def sha256(content: str) -> str:
    """Digest of a text."""
    return hashlib.sha256(content.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Its digest and the sizes of all files are checked. CheckpointError names the problem."""
    manifest = parse_manifest(read_text(folder / MANIFEST), folder)
    for name in manifest.files:
        check_size(manifest, folder / name, _size_of(folder / name))
    return manifest


def parse_manifest(content: str, folder: Path | str) -> Manifest:
    """A manifest from its text, with its digest checked. folder: where it is stored, for messages. CheckpointError as above."""
    path = f"{folder}/{MANIFEST}"
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or type(raw.get("format")) is not int:
        raise CheckpointError(
            f"{path} is not the manifest of a checkpoint: it has no format number. Name a checkpoint's folder."
        )
    if "sources" in raw and "tensors" not in raw:
        raise CheckpointError(f"{folder} has prepared data, not a checkpoint. Name a run's folder or a checkpoint's.")
    if raw["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {raw['format']}; this version reads format {FORMAT}. Use the version of this "
            f"project that wrote it."
        )
    digest = raw.pop("digest", None)
    if digest != _digest(raw):
        raise CheckpointError(
            f"{path} is damaged: its content does not match its digest. Remove {folder} to resume from an older one."
        )
    try:
        manifest = manifest_from(raw)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint manifest: {error}") from error
    return manifest


def manifest_from(raw: dict[str, Any]) -> Manifest:
    """The manifest in a mapping, without its digest. TypeError, ValueError, KeyError or AttributeError if it is not one."""
    if missing := _REQUIRED - raw.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    tensors = {name: _record(name, value) for name, value in raw["tensors"].items()}
    ledger = ledger_of(raw.get("ledger", {}))
    manifest = replace(Manifest(**(raw | {"tensors": {}, "ledger": ledger})), tensors=tensors)
    _check_types(manifest)
    return manifest


def check_size(manifest: Manifest, file: Path | str, found: int | None) -> None:
    """CheckpointError if a file of a checkpoint is missing (None) or has another size than its manifest says."""
    size = manifest.files[str(file).rpartition("/")[2]]
    if found != size:
        raise CheckpointError(
            f"{file} is {'missing' if found is None else f'{found:,} bytes long'}, but the manifest says {size:,} bytes."
            f" The checkpoint is damaged: remove {str(file).rpartition('/')[0]} to resume from an older one."
        )


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size if file.is_file() else None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """The text of a file. CheckpointError for a pipe, a device or a far too long file, which would block the reader."""
    try:
        return read_bounded_text(path, most_bytes=_LONGEST_JSON)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _digest(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")))


def _record(name: str, value: Any) -> TensorRecord:
    if not name.isprintable():
        raise ValueError(f"{name!r} is not the name of a tensor")
    shape = tuple(value["shape"])
    if value["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"{name} is of unknown format {value['dtype']!r}")
    if not all(is_count(n) for n in shape) or math.prod(shape) > LARGEST or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has the impossible shape {str(shape)[:80]}")
    if not isinstance(value["fingerprint"], str) or not _FINGERPRINT.fullmatch(value["fingerprint"]):
        raise ValueError(f"{value['fingerprint']!r} is not a fingerprint of 32 digits")
    not_finite = value.get("not_finite")
    if not_finite is not None and not (is_count(not_finite) and not_finite <= math.prod(shape)):
        raise ValueError(f"{name} has {not_finite!r} elements that are not finite, of {math.prod(shape):,}")
    return TensorRecord(value["dtype"], shape, value["fingerprint"], not_finite)


def _check_types(manifest: Manifest) -> None:
    for key in ("step", "position", "tokens"):
        if not is_count(getattr(manifest, key)):
            raise ValueError(f"{key} is {getattr(manifest, key)!r}, not a count")
    if manifest.updates is not None and not is_count(manifest.updates):
        raise ValueError(f"updates is {manifest.updates!r}, not a count")
    for key in ("data_hash", "tokenizer", "kernels", "index_sha256"):
        if not isinstance(getattr(manifest, key), str):
            raise ValueError(f"{key} is {getattr(manifest, key)!r}, not a text")
    for key in ("layout", "recipe", "versions", "lineage", "files"):
        if not isinstance(getattr(manifest, key), dict):
            raise ValueError(f"{key} is not a mapping")
    for degree, count in manifest.layout.items():
        if not is_count(count):
            raise ValueError(f"layout.{degree} is {count!r}, not a count")
    for group in ("run", "model"):
        if not isinstance(manifest.recipe.get(group, {}), dict):
            raise ValueError(f"recipe.{group} is not a mapping")
    teacher = manifest.lineage.get("teacher")
    if teacher is not None:
        fields = teacher if isinstance(teacher, dict) else {}
        if not all(isinstance(fields.get(key), str) for key in ("checkpoint", "fingerprint")):
            raise ValueError(f"lineage.teacher is {str(teacher)[:80]!r}, not a checkpoint and its fingerprint")
    for name, size in manifest.files.items():
        is_plain = name == Path(name).name and name not in ("", ".", "..") and name.isprintable()
        if not is_plain or len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"{name[:_LONGEST_NAME]!r} is not a plain file name")
        if not is_count(size):
            raise ValueError(f"the size of {name} is {size!r}, not a count")


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 0 on that fits into 64 bits (not JSON's `true` and not 1.0)."""
    return type(value) is int and 0 <= value <= LARGEST
