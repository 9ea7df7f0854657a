"""Writing files that are there whole or not at all: written aside, made durable, then renamed. Nobody else renames files.

    write_text(path, content)               a small file, replaced
    with written_aside(path) as aside: ...  whatever the block writes at `aside` becomes `path`; nothing is left if it fails
    put_in_place(aside, path)               the last part alone, for those who write for long

Each act upon the disk is one function, which reaches the system through this module's `os`: so tests can stop a process,
or fail, at any of them.
"""

import ctypes
import functools
import itertools
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_VECTORS = 512
"""Buffers handed to one writev; the system takes at most 1,024 (IOV_MAX)."""
STEP = 8 << 20
"""Bytes handed to one writev: while the disk takes them, the next are copied."""
_SYNC_FILE_RANGE_WRITE = 2
"""sync_file_range(2): begin to write dirty pages, do not wait."""


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A new file's descriptor for writing. Raises OSError; FileExistsError if it is there."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def write_new(path: Path, parts: Sequence[memoryview | bytes]) -> None:
    """Write a new file from `parts`, one behind the other. Raises as `new_file`."""
    with new_file(path) as handle:
        for _ in write_in_steps(handle, parts):
            pass


def append(path: Path, parts: Sequence[memoryview | bytes]) -> None:
    """Add `parts` to a file."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        for _ in write_in_steps(handle, parts):
            pass
    finally:
        os.close(handle)


def write_in_steps(handle: int, parts: Sequence[memoryview | bytes]) -> Iterator[int]:
    """Write `parts` at the end of a file. Yields the file's size after every few megabytes, which the disk then begins to take:
    the fsync at the end finds little left to do."""
    queue = deque(memoryview(part).cast("B") for part in parts if len(part))
    size = os.fstat(handle).st_size
    while queue:
        step, room = [], STEP
        for part in itertools.islice(queue, _VECTORS):
            step.append(part[:room])
            room -= len(step[-1])
            if not room:
                break
        took = write(handle, step)
        _begin_writeback(handle, size, took)
        size += took
        while queue and took >= len(queue[0]):
            took -= len(queue.popleft())
        if took:
            queue[0] = queue[0][took:]
        yield size


def write(handle: int, parts: Sequence[memoryview]) -> int:
    """Hand parts to the system. -> bytes it took."""
    return os.writev(handle, parts)


def _begin_writeback(handle: int, start: int, size: int) -> None:
    """Have the system begin to write a range to the disk. A hint: errors come out of the fsync that must follow."""
    function = _sync_file_range()
    if function is not None:
        function(handle, start, size, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> "ctypes._NamedFuncPointer | None":
    """Linux's own call; None elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def sync_file(handle: int) -> None:
    """Make a file durable through the descriptor that wrote it, which is told of every failure since."""
    os.fsync(handle)


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
    """Delete a folder and the files in it; of a link to one, the link only. Raises the first error at the end."""
    if folder.is_symlink():
        remove(folder)
        return
    problem: OSError | None = None
    for path in sorted(folder.iterdir()):
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else remove(path)
        except OSError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    os.rmdir(folder)


def aside_of(path: Path, *, is_own: bool = False) -> Path:
    """Where a file or folder is written until it is whole; no reader takes the name for that of a finished one.

    `.NAME.writing` if one process writes it at a time: the next one finds and replaces what a killed one left. is_own: a name
    of this thread's own, `.NAME.writing-HOST-THREAD`, if several may write the same file at once; a cleaner removes it.
    """
    own = f"-{os.uname().nodename}-{threading.get_native_id()}" if is_own else ""
    return path.with_name(f".{path.name}.writing{own}")


def put_in_place(aside: Path, path: Path) -> None:
    """Make a file or folder that was written aside durable and give it its name, durably."""
    sync(aside)
    rename(aside, path)
    sync(path.parent)


@contextmanager
def written_aside(path: Path, *, is_own: bool = False) -> Iterator[Path]:
    """A place at which the block writes a file that becomes `path` when it ends. If it fails, e.g. on a full disk, none is left.

    is_own: as in `aside_of`.
    """
    aside = aside_of(path, is_own=is_own)
    try:
        aside.unlink(missing_ok=True)
        yield aside
        put_in_place(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, *, is_own: bool = False) -> None:
    """Write or replace a small file, whole or not at all. Raises OSError; the old file then stays, and nothing else."""
    with written_aside(path, is_own=is_own) as aside:
        write_new(aside, [content])


def write_text(path: Path, content: str, *, is_own: bool = False) -> None:
    """The same of a text, in UTF-8."""
    write_bytes(path, content.encode(), is_own=is_own)
