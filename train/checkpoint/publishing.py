"""Making a checkpoint visible, and taking old ones away: renames in an order in which a kill loses nothing.

.step_00000150.writing     being written; left by a process that died; removed by the next save
.step_00000150.replaced    a damaged or older step of the same number, for the moment in which the new one takes its place
.step_00000050.deleting    no longer kept; or what cannot be deleted: left there, and tried again by later saves
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


def seal(aside: Path, manifest: Manifest, index: Index) -> Manifest:
    """Add index and manifest to the files written aside and make everything durable. -> the complete manifest.

    manifest: with its tensors, and its files but the index.
    """
    text = index_text(index)
    files = manifest.files | {INDEX: len(text.encode())}
    manifest = replace(manifest, files=files, index_sha256=sha256(text))
    disk.write_new(aside / INDEX, [text.encode()])
    disk.write_new(aside / MANIFEST, [manifest_text(manifest).encode()])
    for path in (aside / INDEX, aside / MANIFEST, aside):
        disk.sync(path)
    return manifest


@dataclass(frozen=True)
class Left:
    """What should be deleted and cannot be: files of another owner, an immutable one, one that an NFS client holds open."""

    path: Path
    error: OSError


def publish(aside: Path, final: Path) -> list[Left]:
    """Give a complete, durable folder its name; what had the name goes away. A kill leaves the old or the new (`clean_up`)."""
    old = _free(final.with_name(f".{final.name}.replaced"))
    if final.exists():
        disk.rename(final, old)
    disk.rename(aside, final)
    disk.sync(final.parent)
    return _discard(old) if old.exists() else []


def point_at(folder: Path, name: str) -> None:
    """Move the pointer, atomically: a reader sees the old or the new name, never part of one."""
    disk.write_text(folder / POINTER, name + "\n")


def delete(path: Path) -> list[Left]:
    """Take a checkpoint away. Renamed first, so that a reader never meets half of one. Raises nothing: see what comes back."""
    doomed = _free(path.with_name(f".{path.name}.deleting"))
    try:
        disk.rename(path, doomed)
    except OSError as error:
        return [Left(path, error)]
    return _discard(doomed)


def clean_up(folder: Path) -> list[Left]:
    """Remove what processes that died left behind. A replaced step whose successor never came gets its name back.

    What cannot be removed is out of the way of later saves, if it can be renamed, and comes back.
    """
    left = []
    for leftover in sorted(folder.glob(".*")):
        name = leftover.name.removeprefix(".")
        if name.endswith(".replaced") and not (final := folder / name.split(".")[0]).exists():
            try:
                disk.rename(leftover, final)
            except OSError as error:
                left.append(Left(leftover, error))
        elif name.endswith((".writing", ".deleting", ".replaced")):
            left += _discard(leftover)
    return left


def _discard(path: Path) -> list[Left]:
    """Remove a file or folder; what cannot be gets a name that no save needs."""
    try:
        disk.remove_tree(path) if path.is_dir() else disk.remove(path)
    except OSError as error:
        if not path.name.endswith(".deleting"):
            with suppress(OSError):
                disk.rename(path, _free(path.with_name(f"{path.name}.deleting")))
        return [Left(path, error)]
    return []


def _free(path: Path) -> Path:
    """This name, or one with a number before its last part that nothing has: `.step_00000050.2.deleting`."""
    stem, _, kind = path.name.rpartition(".")
    for number in itertools.count(2):
        if not os.path.lexists(path):
            break
        path = path.with_name(f"{stem}.{number}.{kind}")
    return path
