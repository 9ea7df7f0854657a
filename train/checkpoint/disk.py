"""Every act of a save upon the disk, one function each, so that tests can stop a process, or fail, at any of them."""

import itertools
import os
import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path

_VECTORS = 512
"""Buffers handed to one writev; the system takes at most 1,024 (IOV_MAX)."""


def write_new(path: Path, parts: Sequence[memoryview | bytes]) -> None:
    """Write a new file from `parts`, one behind the other. Raises OSError; FileExistsError if it is there."""
    _write(path, os.O_CREAT | os.O_EXCL, parts)


def append(path: Path, parts: Sequence[memoryview | bytes]) -> None:
    """Add `parts` to a file."""
    _write(path, os.O_APPEND, parts)


def _write(path: Path, flags: int, parts: Sequence[memoryview | bytes]) -> None:
    handle = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        queue = deque(memoryview(part).cast("B") for part in parts if len(part))
        while queue:
            done = write(handle, list(itertools.islice(queue, _VECTORS)))
            while queue and done >= len(queue[0]):
                done -= len(queue.popleft())
            if done:
                queue[0] = queue[0][done:]
    finally:
        os.close(handle)


def write(handle: int, parts: Sequence[memoryview]) -> int:
    """Hand parts to the system. -> bytes it took."""
    return os.writev(handle, parts)


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: Path, new: Path) -> None:
    """Rename atomically; a file at `new` is replaced, a folder there must be empty."""
    os.rename(old, new)


def make_folder(path: Path) -> None:
    """Make a new folder."""
    os.mkdir(path)


def remove(path: Path) -> None:
    """Delete a file."""
    os.unlink(path)


def remove_tree(folder: Path) -> None:
    """Delete a folder and the files in it."""
    for path in sorted(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else remove(path)
    os.rmdir(folder)


def write_text(path: Path, content: str) -> None:
    """Replace a small file: written aside, made durable, renamed, the folder made durable."""
    aside = path.with_name(f".{path.name}.writing")
    aside.unlink(missing_ok=True)
    write_new(aside, [content.encode()])
    sync(aside)
    rename(aside, path)
    sync(path.parent)
