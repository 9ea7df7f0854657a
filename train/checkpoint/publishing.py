"""Publishes a checkpoint and deletes old ones. The order of the renames is such that a kill at any point loses nothing.

.step_00000150.writing     being written; if left by a killed process, the next save removes it
.step_00000150.replaced    the old checkpoint of the same step, while the new one replaces it
.step_00000050.deleting    being deleted; if that fails it stays, and later saves try again
latest                     name of the newest checkpoint; replaced atomically, last
"""

import itertools
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from data.system import disk
from recipes.schema.run_folder import POINTER as POINTER
from train.checkpoint.manifest import INDEX, MANIFEST, Index, Manifest, index_text, manifest_text, sha256


def seal(unfinished: Path, manifest: Manifest, index: Index) -> Manifest:
    """Add index and manifest to the files in the temporary folder and make all durable. -> the complete manifest.

    manifest: has its tensors, and all its files except the index.
    """
    text = index_text(index)
    files = manifest.files | {INDEX: len(text.encode())}
    manifest = replace(manifest, files=files, index_sha256=sha256(text))
    disk.write_new(unfinished / INDEX, [text.encode()])
    disk.write_new(unfinished / MANIFEST, [manifest_text(manifest).encode()])
    for path in (unfinished / INDEX, unfinished / MANIFEST, unfinished):
        disk.sync(path)
    return manifest


@dataclass(frozen=True)
class NotDeleted:
    """A file or folder that could not be deleted: for example immutable, another owner's, or open on an NFS client."""

    path: Path
    error: OSError


def publish(unfinished: Path, final: Path) -> list[NotDeleted]:
    """Rename a complete, durable folder to its final name and delete what had that name. After a kill at any point, `clean_up`
    gives the old or the new checkpoint."""
    old = unused(final.with_name(f".{final.name}.replaced"))
    if os.path.lexists(final):
        disk.rename(final, old)
    disk.rename(unfinished, final)
    disk.sync(final.parent)
    return _discard(old) if os.path.lexists(old) else []


def publish_step(unfinished: Path, final: Path) -> tuple[Path, list[NotDeleted]]:
    """`publish` for a run's step. -> the published folder, and what could not be deleted.

    If a folder of that step exists and cannot be renamed, the step gets one more zero in its name: step_000000100 is step 100
    too, and readers prefer it to step_00000100.
    """
    left: list[NotDeleted] = []
    while os.path.lexists(final):
        try:
            return final, left + publish(unfinished, final)
        except OSError as error:
            if not unfinished.exists() or not os.path.lexists(final):
                raise  # a rename has succeeded, so another operation failed
            left.append(NotDeleted(final, error))
            final = final.with_name(final.name.replace("_", "_0", 1))
    return final, left + publish(unfinished, final)


def point_at(folder: Path, name: str) -> None:
    """Replace the pointer atomically: a reader sees the old or the new name, never a part of one."""
    disk.write_text(folder / POINTER, name + "\n")


def delete(path: Path) -> list[NotDeleted]:
    """Delete a checkpoint. It is renamed first, so that a reader never sees half of one. Does not raise: see the result."""
    deleting = unused(path.with_name(f".{path.name}.deleting"))
    try:
        disk.rename(path, deleting)
    except OSError as error:
        return [NotDeleted(path, error)]
    return _discard(deleting)


def clean_up(folder: Path) -> list[NotDeleted]:
    """Remove files and folders that killed processes left. A replaced checkpoint without a successor gets its name back.

    Files and folders that cannot be removed are renamed if possible, so that they do not block later saves, and are returned.
    """
    left = []
    for leftover in sorted(folder.glob(".*")):
        name = leftover.name.removeprefix(".")
        if name.endswith(".replaced") and not (final := folder / name.split(".")[0]).exists():
            try:
                disk.rename(leftover, final)
            except OSError as error:
                left.append(NotDeleted(leftover, error))
        elif name.endswith((".writing", ".deleting", ".replaced")):
            left += _discard(leftover)
    return left


def _discard(path: Path) -> list[NotDeleted]:
    """Remove a file or folder. If that fails, rename it to a name that no save uses."""
    try:
        disk.remove_tree(path) if path.is_dir() else disk.remove(path)
    except OSError as error:
        if not path.name.endswith(".deleting"):
            with suppress(OSError):
                disk.rename(path, unused(path.with_name(f"{path.name}.deleting")))
        return [NotDeleted(path, error)]
    return []


def unused(path: Path) -> Path:
    """This path, or the first unused one with a number before the suffix: `.step_00000050.2.deleting`."""
    stem, _, kind = path.name.rpartition(".")
    for number in itertools.count(2):
        if not os.path.lexists(path):
            break
        path = path.with_name(f"{stem}.{number}.{kind}")
    return path
