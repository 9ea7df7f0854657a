"""The checkpoints of a run on disk: which exist, which is the newest, and which one a user's path names.

It only reads, without a model or process groups, so that offline commands and login nodes can use it.
"""

import logging
from pathlib import Path

from recipes.schema.errors import CheckpointError
from recipes.schema.ledger import Ledger
from recipes.schema.manifest import MANIFEST, Manifest, describe_not_finite, read_manifest
from recipes.schema.run_folder import CHECKPOINTS, METRICS, POINTER, how_to_import, pointed_at, read_metrics
from recipes.schema.run_folder import name_of as name_of
from recipes.schema.run_folder import step_of as step_of
from recipes.schema.run_folder import steps_in as steps_in

log = logging.getLogger(__name__)

SKIPPED = "skipped: "
"""First word of a note about a checkpoint that is not complete."""


def manifest_of(path: Path) -> Manifest:
    """The manifest of a step's folder. CheckpointError if it is damaged, or if its step is not the one in the folder's name."""
    manifest = read_manifest(path)
    if manifest.step != step_of(path):
        raise CheckpointError(
            f"{path} contains step {manifest.step:,}, not the step in its name. If it belongs to this run, rename it to "
            f"{name_of(manifest.step)}; otherwise move it away."
        )
    return manifest


def candidates(folder: Path) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """(checkpoints whose manifest and file sizes are right, newest first; notes about the others and the pointer).

    The tensors are not read. The pointer is only a hint: a process may die after it published a checkpoint and before it
    moved the pointer, so the newest complete checkpoint counts.
    """
    good, notes = [], []
    for path in reversed(steps_in(folder)):
        try:
            manifest = manifest_of(path)
            if manifest.not_finite:
                raise CheckpointError(f"{path}: {describe_not_finite(manifest.not_finite)}")
            good.append((path, manifest))
        except CheckpointError as error:
            notes.append(f"{SKIPPED}{error}")
    pointer = folder / POINTER
    try:
        named = pointed_at(folder)
    except OSError as error:
        return good, [*notes, f"{pointer} cannot be read: {error.strerror or error}"]
    if good and named != good[0][0].name:
        state = "is missing" if named is None else "is empty" if not named else f"says {named[:40]!r}"
        notes.append(f"{pointer} {state}; the newest complete checkpoint is {good[0][0].name}.")
    return good, notes


def newest_in(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest and file sizes are right, with its manifest; None if none was ever written.

    Warns about each that it skips. Raises CheckpointError if checkpoints were written but none is complete, because starting
    at step 0 would hide the loss of a run.
    """
    good, notes = candidates(folder)
    if good:
        for note in notes:
            log.warning(note)
        return good[0]
    refuse_lost_checkpoints(folder, notes)
    return None


def refuse_lost_checkpoints(folder: Path, notes: list[str]) -> None:
    """CheckpointError if there are traces of checkpoints but none can be used. notes: those of `candidates`."""
    pointer = folder / POINTER
    traces = notes or [f"{pointer} exists, but the checkpoint it names does not"] * pointer.exists()
    if traces:
        raise CheckpointError(
            f"no checkpoint in {folder} is complete:\n  "
            + "\n  ".join(traces)
            + f"\nRestore one, or move {folder} away to start from step 0."
        )


def checkpoint_at(place: str | Path) -> tuple[Path, Manifest]:
    """The checkpoint that a user's path names: a checkpoint folder, or the newest in a run's folder. Its manifest is checked.

    Raises CheckpointError if there is none, or none is complete.
    """
    if not str(place).strip():
        raise CheckpointError(f"{str(place)!r} is not the name of a checkpoint. Name a folder like runs/NAME.")
    path = Path(place)
    try:
        is_checkpoint = (path / MANIFEST).is_file()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if is_checkpoint:
        return path, read_manifest(path)
    for folder in (path / CHECKPOINTS, path):
        found = newest_in(folder)
        if found is not None:
            return found
    if foreign := how_to_import(path):
        raise CheckpointError(foreign)
    raise CheckpointError(
        f"{path} is neither a checkpoint (it has no {MANIFEST}) nor a run with a checkpoint. Name a folder like runs/NAME or "
        f"runs/NAME/checkpoints/{name_of(1000)}."
    )


def ledger_in(run: Path) -> Ledger:
    """The ledger in the newest complete checkpoint of a run's folder; an empty one without a checkpoint."""
    good, _ = candidates(run / CHECKPOINTS)
    return good[0][1].ledger if good else Ledger()


def lost_run(folder: Path) -> str:
    """A sentence about checkpoints that metrics.jsonl records but that are missing now; empty if none were ever written."""
    try:
        lines = read_metrics(folder / METRICS)
        last = max((int(line["step"]) for line in lines if line["kind"] == "step"), default=0)
    except (OSError, KeyError, TypeError, ValueError):
        return ""
    had_checkpoint = any(line["kind"] == "save" for line in lines)
    if not had_checkpoint:
        return ""
    return f"{folder} is a run of {last:,} steps that wrote checkpoints, but {folder / CHECKPOINTS} has none."
