"""The step folders of a run, as the disk has them: which there are, which is the newest, what a user's path means.

Reading only, no model and no process group: the offline commands and login nodes use this.
"""

import logging
from pathlib import Path

from recipes.schema.errors import CheckpointError
from recipes.schema.manifest import MANIFEST, Manifest, describe_not_finite, read_manifest
from recipes.schema.run_folder import CHECKPOINTS, METRICS, POINTER, how_to_import, pointed_at, read_metrics
from recipes.schema.run_folder import name_of as name_of
from recipes.schema.run_folder import step_of as step_of
from recipes.schema.run_folder import steps_in as steps_in

log = logging.getLogger(__name__)

PASSED_OVER = "passed over: "
"""Begin of a note about a checkpoint that is not whole."""


def manifest_of(path: Path) -> Manifest:
    """The manifest of a step's folder. CheckpointError if it is damaged, or of another step than the folder's name says."""
    manifest = read_manifest(path)
    if manifest.step != step_of(path):
        raise CheckpointError(
            f"{path} holds step {manifest.step:,}, not the one it is named after. Name it {name_of(manifest.step)} if it is of "
            f"this run, or move it away."
        )
    return manifest


def candidates(folder: Path) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """Checkpoints whose manifest and file sizes are right, newest first; and what is wrong with pointer and others.

    The content is not read here. The pointer is only a hint: a newer whole checkpoint counts, for a process may die
    between publishing it and moving the pointer.
    """
    good, notes = [], []
    for path in reversed(steps_in(folder)):
        try:
            manifest = manifest_of(path)
            if manifest.not_finite:
                raise CheckpointError(f"{path}: {describe_not_finite(manifest.not_finite)}")
            good.append((path, manifest))
        except CheckpointError as error:
            notes.append(f"{PASSED_OVER}{error}")
    pointer = folder / POINTER
    try:
        named = pointed_at(folder)
    except OSError as error:
        return good, [*notes, f"{pointer} cannot be read: {error.strerror or error}"]
    if good and named != good[0][0].name:
        said = "is missing" if named is None else "is empty" if not named else f"says {named[:40]!r}"
        notes.append(f"{pointer} {said}; the newest whole checkpoint is {good[0][0].name}.")
    return good, notes


def newest_in(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest and file sizes are right, and its manifest; None if there never was one.

    Warns of what is passed over. Raises CheckpointError where checkpoints were written but none is whole: starting from
    zero would hide the loss of a run.
    """
    good, notes = candidates(folder)
    if good:
        for note in notes:
            log.warning(note)
        return good[0]
    refuse_to_forget(folder, notes)
    return None


def refuse_to_forget(folder: Path, notes: list[str]) -> None:
    """Raise CheckpointError where there is a trace of checkpoints but none that can be used."""
    pointer = folder / POINTER
    traces = notes or [f"{pointer} is there, the checkpoint it names is not"] * pointer.exists()
    if traces:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole:\n  "
            + "\n  ".join(traces)
            + f"\nBring one back, or move {folder} away to start from the beginning."
        )


def checkpoint_at(place: str | Path) -> tuple[Path, Manifest]:
    """The checkpoint a user names: a checkpoint folder itself, or the newest of a run's folder; its manifest is checked.

    Raises CheckpointError if there is none, or none is complete.
    """
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
        f"{path} is no checkpoint (no {MANIFEST}) and no run that has one. Name a folder like runs/NAME or "
        f"runs/NAME/checkpoints/{name_of(1000)}."
    )


def lost_run(folder: Path) -> str:
    """What a run's record says of checkpoints that are gone; empty if it never had one."""
    try:
        lines = read_metrics(folder / METRICS)
        last = max((int(line["step"]) for line in lines if line["kind"] == "step"), default=0)
    except (OSError, KeyError, TypeError, ValueError):
        return ""
    had_checkpoint = any(line["kind"] == "save" for line in lines)
    if not had_checkpoint:
        return ""
    return f"{folder} holds a run of {last:,} steps that wrote checkpoints, but {folder / CHECKPOINTS} holds none."
