"""A lock file that allows one `stratum prepare` of a folder at a time and names its owner. Tasks of an array job share it.

The kernel releases it when the process ends, also after a kill. On a file system without locks, nothing is locked.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

LOCK = ".prepare.lock"


@contextlib.contextmanager
def prepare_lock(folder: Path, *, is_shared: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder's lock. Waits until it is free and reports its owner. is_shared: other tasks may share the lock."""
    path = folder / LOCK
    stream = _open_locked(path, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX, say)
    try:
        yield
    finally:
        with stream, contextlib.suppress(OSError):
            fcntl.flock(
                stream, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # fails if another task still has the lock: the last one removes the file
            path.unlink(missing_ok=True)


def _open_locked(path: Path, kind: int, say: Callable[[str], None]) -> IO[str]:
    has_reported = False
    while True:
        stream = path.open("a+")
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                return stream  # this file system has no locks
            if not has_reported:
                stream.seek(0)
                say(f"{path.parent} is being prepared by {stream.read().strip() or 'another process'}. Waiting for it.")
                has_reported = True
            fcntl.flock(stream, kind)
        if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            break
        stream.close()  # its last owner removed the file meanwhile: lock the new one
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    stream.flush()
    return stream
