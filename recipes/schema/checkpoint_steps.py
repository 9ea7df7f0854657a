"""The step folders of a run, as the disk has them: which there are, which is the newest, what a user's path means.

Reading only, no model and no process group: the offline commands and login nodes use this.
"""

import json
import logging
import os
import re
from pathlib import Path

from recipes.schema.errors import CheckpointError
from recipes.schema.manifest import MANIFEST, Manifest, describe_not_finite, read_manifest

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
"""A run's record, next to its folder of checkpoints."""
POINTER = "latest"
"""File that names the newest whole checkpoint of a folder; only a hint."""
_NAME = re.compile(r"step_[0-9]{1,18}")
PASSED_OVER = "passed over: "
"""Begin of a note about a checkpoint that is not whole."""


def name_of(step: int) -> str:
    """Name of the folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def steps_in(folder: Path) -> list[Path]:
    """Checkpoints that were published in a folder, oldest first. CheckpointError where the folder cannot be read."""
    try:
        # Not glob: it passes over a folder that may not be read, and a run would start again at step 0.
        named = [folder / name for name in os.listdir(folder) if _NAME.fullmatch(name) and (folder / name).is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def manifest_of(path: Path) -> Manifest:
    """The manifest of a step's folder. CheckpointError where it is not right, or of another step than the folder's name says."""
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
        named = _named_by(pointer) if pointer.is_file() else None
    except OSError as error:
        return good, [*notes, f"{pointer} cannot be read: {error.strerror or error}"]
    if good and named != good[0][0].name:
        said = "is missing" if named is None else "is empty" if not named else f"says {named[:40]!r}"
        notes.append(f"{pointer} {said}; the newest whole checkpoint is {good[0][0].name}.")
    return good, notes


def _named_by(pointer: Path) -> str:
    with pointer.open("rb") as stream:
        return stream.read(200).decode(errors="replace").strip()


def newest_in(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest and file sizes are right, and its manifest; None where there never was one.

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

    Raises CheckpointError where there is none, or none is whole.
    """
    path = Path(place)
    if (path / MANIFEST).is_file():
        return path, read_manifest(path)
    for folder in (path / "checkpoints", path):
        found = newest_in(folder)
        if found is not None:
            return found
    raise CheckpointError(
        f"{path} is no checkpoint (no {MANIFEST}) and no run that has one. Name a folder like runs/NAME or "
        f"runs/NAME/checkpoints/{name_of(1000)}."
    )


def lost_run(folder: Path) -> str:
    """What a run's record says of checkpoints that are gone; empty where it never had one."""
    last, had_checkpoint = 0, False
    try:
        with (folder / METRICS).open("rb") as stream:
            for text in stream:
                if b'"step"' not in text and b'"save"' not in text:
                    continue
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # torn by a kill
                kind = line.get("kind") if isinstance(line, dict) else None
                last = max(last, int(line["step"])) if kind == "step" else last
                had_checkpoint |= kind == "save"
    except (OSError, KeyError, TypeError, ValueError):
        return ""
    if not had_checkpoint:
        return ""
    return f"{folder} holds a run of {last:,} steps that wrote checkpoints, but {folder / 'checkpoints'} holds none."
