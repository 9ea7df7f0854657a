"""One checkpoint on disk: Megatron's sharded files plus a manifest, written aside, made durable, then renamed.

    step_00000100/
        manifest.json     what this is: format, step, position, layout, recipe, files and their sizes
        metadata.json, .metadata, common.pt, __0_0.distcp ...   Megatron's dist_checkpointing

Every tensor is stored under its whole-model name with its place in the whole, so another layout can read it. Until the
rename the folder is called `.step_00000100.writing`; a reader that sees `step_...` sees a whole checkpoint.
"""

import json
import logging
import os
import queue
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling

from train.engine import Engine
from train.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"

_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""Megatron's way of storing optimizer state per parameter instead of per data-parallel slice: any layout can read it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    """Optimizer steps finished."""
    position: int
    """Rows consumed from the training stream."""
    tokens: int
    """Tokens trained on."""
    layout: dict[str, int]
    """Degrees it was written at. Informational: any layout can read it."""
    recipe: dict[str, Any]
    """The resolved recipe of the run that wrote it."""
    data_hash: str
    """Hash of the data manifest the position refers to."""
    files: dict[str, int]
    """Size in bytes of every other file of the checkpoint."""
    versions: dict[str, str]
    """Versions of torch and Megatron-Core."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer the model was trained with; empty where it is not known."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from, when not from training alone: a pruned checkpoint's parent and what was kept."""
    format: int = FORMAT


def write_tensors(folder: Path, engine: Engine) -> None:
    """Write weights and optimizer state of all ranks into `folder`. Collective over the world."""
    # Without this Megatron starts a helper process that imports everything again (15 s) and outlives a killed trainer.
    filesystem_async._results_queue = queue.Queue()
    engine.precision.gather_state()
    with _as_checkpoint_error(folder, "write"):
        dist_checkpointing.save(_sharded_state(engine, is_loading=False), str(folder), content_metadata=dict(_SHARDING))


def read_tensors(folder: Path, engine: Engine) -> None:
    """Fill weights and optimizer state of this rank from `folder`, whatever layout wrote it. Collective."""
    with _as_checkpoint_error(folder, "read"):
        state, missing, unexpected = dist_checkpointing.load(
            _sharded_state(engine, is_loading=True), str(folder), strict=StrictHandling.RETURN_ALL
        )
    strange = sorted(key for key in {*missing, *unexpected} if not _is_precision_state(key))
    if strange:
        raise CheckpointError(
            f"{folder} does not hold this model: {len(strange)} names are on one side only, e.g. {', '.join(strange[:3])}."
        )
    if missing or unexpected:
        log.warning(
            "%s was written by another precision backend: scales and amax histories start anew, so the first steps will "
            "not repeat those of the run that wrote it.",
            folder,
        )
    for key, chunk in _named_chunks(engine):
        chunk.module.load_state_dict(state[key], strict=not (missing or unexpected))
    engine.optimizer.load_state_dict(state["optimizer"])
    engine.precision.apply_state()


def read_weights(folder: Path, chunks: list[Any], *, groups: Any) -> None:
    """Fill the weights of unwrapped model chunks only (evaluation, generation, starting from other weights). Collective.

    CheckpointError names weights that only one side has. A precision backend's own state may be missing.
    """
    metadata = {**_SHARDING, "dp_cp_group": groups.dp_cp}
    keys = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    wanted = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(keys, chunks, strict=True)}
    with _as_checkpoint_error(folder, "read"):
        state, unused, absent = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RETURN_ALL)
    for names, problem in ((absent, "lacks"), (unused, "holds, and this model lacks,")):
        if weights := sorted(k for k in names if not (_is_precision_state(k) or k.startswith("optimizer."))):
            raise CheckpointError(
                f"{folder} is of another model: it {problem} {len(weights)} weights, e.g. {', '.join(weights[:3])}."
            )
    for key, chunk in zip(keys, chunks, strict=True):
        chunk.load_state_dict(state[key], strict=not absent)


def publish(aside: Path, final: Path, manifest: Manifest) -> None:
    """Complete a checkpoint written aside: manifest, fsync of every file and folder, rename. One rank calls it."""
    files = {str(p.relative_to(aside)): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
    text = json.dumps(asdict(manifest) | {"files": files}, indent=1)
    (aside / MANIFEST).write_text(text)
    for path in [*aside.rglob("*"), aside]:
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _fsync(final.parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, with the sizes of its files checked. CheckpointError names what is wrong."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
        manifest = Manifest(**raw)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint manifest: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.format}; this version reads format {FORMAT}. Use the version of "
            f"this project that wrote it."
        )
    for name, size in manifest.files.items():
        file = folder / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            raise CheckpointError(
                f"{file} is {'missing' if found is None else f'{found:,} bytes long'}, the manifest says {size:,} bytes."
                f" The checkpoint is damaged: remove {folder} to resume from an older one."
            )
    return manifest


def write_pointer(pointer: Path, name: str) -> None:
    """Point at checkpoint `name`, atomically: a reader sees the old or the new name, never part of one."""
    aside = pointer.with_name(f".{pointer.name}.writing")
    aside.write_text(name + "\n")
    _fsync(aside)
    aside.rename(pointer)
    _fsync(pointer.parent)


def versions() -> dict[str, str]:
    """Versions of the libraries whose formats a checkpoint depends on."""
    import megatron.core

    return {"torch": torch.__version__, "megatron-core": megatron.core.__version__}


def _is_precision_state(key: str) -> bool:
    """Whether a name in a checkpoint is a precision backend's own state: ours, or Transformer Engine's."""
    return ".low_precision_" in key or key.endswith("._extra_state") or "._extra_state/" in key


def _named_chunks(engine: Engine) -> list[tuple[str, Any]]:
    if len(engine.chunks) == 1:
        return [("model", engine.chunks[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(engine.chunks)]


def _sharded_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    metadata = {**_SHARDING, "dp_cp_group": engine.mesh.groups.dp_cp}
    state = {key: chunk.module.sharded_state_dict(metadata=metadata) for key, chunk in _named_chunks(engine)}
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _as_checkpoint_error:
    """Turn what storage raises into a CheckpointError that names the place."""

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder, self.verb = folder, verb

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise CheckpointError(f"could not {self.verb} {self.folder}: {type(error).__name__}: {error}") from error
