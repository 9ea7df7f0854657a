"""Making a checkpoint visible, and taking old ones away: renames in an order in which a kill loses nothing.

.step_00000150.writing     being written; left by a process that died; removed by the next save
.step_00000150.replaced    a damaged or older step of the same number, for the moment in which the new one takes its place
.step_00000050.deleting    no longer kept
latest                     name of the newest checkpoint; replaced atomically, last
"""

from dataclasses import replace
from pathlib import Path

from data.system import disk
from recipes.schema.checkpoint_steps import POINTER as POINTER
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


def publish(aside: Path, final: Path) -> None:
    """Give a complete, durable folder its name; what had the name goes away. A kill leaves the old or the new (`recover`)."""
    old = final.with_name(f".{final.name}.replaced")
    if final.exists():
        disk.rename(final, old)
    disk.rename(aside, final)
    disk.sync(final.parent)
    if old.exists():
        disk.remove_tree(old)


def point_at(folder: Path, name: str) -> None:
    """Move the pointer, atomically: a reader sees the old or the new name, never part of one."""
    disk.write_text(folder / POINTER, name + "\n")


def delete(path: Path) -> None:
    """Take a checkpoint away. Renamed first, so that a reader never meets half of one."""
    doomed = path.with_name(f".{path.name}.deleting")
    disk.rename(path, doomed)
    disk.remove_tree(doomed)


def clean_up(folder: Path) -> None:
    """Remove what processes that died left behind. A replaced step whose successor never came gets its name back."""
    for leftover in sorted(folder.glob(".*")):
        name = leftover.name.removeprefix(".")
        if name.endswith(".replaced"):
            final = folder / name.removesuffix(".replaced")
            if final.exists():
                disk.remove_tree(leftover)
            else:
                disk.rename(leftover, final)
        elif name.endswith((".writing", ".deleting")):
            disk.remove_tree(leftover) if leftover.is_dir() else disk.remove(leftover)
