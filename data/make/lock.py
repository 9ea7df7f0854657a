"""One prepare of a folder at a time: a lock that names its owner. Tasks of an array job share it with each other.

It is released when its process ends, however that happens. File systems without locks are used without.
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
    """Hold a folder's lock; says who holds it while it waits. is_shared: others that share it may hold it too."""
    path = folder / LOCK
    stream = _taken(path, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX, say)
    try:
        yield
    finally:
        with stream, contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # alone: no other task holds it
            path.unlink(missing_ok=True)


def _taken(path: Path, kind: int, say: Callable[[str], None]) -> IO[str]:
    has_said = False
    while True:
        stream = path.open("a+")
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                return stream  # no locks here
            if not has_said:
                stream.seek(0)
                say(f"{path.parent} is being prepared by {stream.read().strip() or 'another process'}. Waiting for it.")
                has_said = True
            fcntl.flock(stream, kind)
        if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            break
        stream.close()  # its last owner removed it
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    stream.flush()
    return stream
