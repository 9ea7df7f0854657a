"""A new folder that is complete or does not exist: written next to its place, renamed at the end."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.system import disk
from recipes.schema import units
from recipes.schema.errors import RecipeError
from recipes.schema.manifest import MANIFEST
from recipes.schema.run_folder import CHECKPOINTS, RECIPE


def check_new_folder(out: Path) -> None:
    """RecipeError if `out` cannot become a new folder: it exists and is not an empty folder, or it is inside a checkpoint, among
    the checkpoints of a run, or inside prepared data. Readers of those would take it for a part that is damaged.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise RecipeError(f"{out} is a {'symbolic link' if out.is_symlink() else 'file'}. Choose another --out.")
    if out.exists() and any(out.iterdir()):
        raise RecipeError(f"{out} is not empty. Choose another --out; nothing is overwritten.")
    for parent in out.absolute().parents:
        is_of_run = parent.name == CHECKPOINTS and (parent.parent / RECIPE).is_file()
        if is_of_run or (parent / MANIFEST).is_file():
            raise RecipeError(f"{out} is inside {parent}, which has checkpoints or data. Choose another --out.")


@contextmanager
def new_folder(out: Path, *, needed: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A temporary folder next to `out`, and a function that renames it to `out`. If that is not called, it is removed.

    needed: bytes that will be written. RecipeError as `check_new_folder`, or if the disk has too little space.
    """
    check_new_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{out.parent} cannot be created: {error.strerror}. Choose another --out.") from error
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RecipeError(f"{out} needs {units.size(needed)}, {units.size(free)} are free there.")
    folder = disk.aside_of(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def publish() -> None:
        if out.exists():
            out.rmdir()
        disk.put_in_place(folder, out)

    try:
        yield folder, publish
    finally:
        shutil.rmtree(folder, ignore_errors=True)
