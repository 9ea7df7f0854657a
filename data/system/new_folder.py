"""A new folder that is complete or does not exist: written next to its place, renamed at the end."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.system import disk
from recipes.schema import units
from recipes.schema.errors import RecipeError


@contextmanager
def new_folder(out: Path, *, needed: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A temporary folder next to `out`, and a function that renames it to `out`. If that is not called, it is removed.

    needed: bytes that will be written. RecipeError if `out` is not empty or the disk has too little space.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} is not empty. Choose another --out; nothing is overwritten.")
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
