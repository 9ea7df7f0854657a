"""Run tests as an unprivileged user: root may read and delete everything, so permission errors do not occur.

with folder_for_anyone() as folder, unprivileged(): ...      as uid 65534 if the tests run as root, else as they run
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Give up root privileges inside, in every thread of this process."""
    if os.geteuid() != 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@contextmanager
def folder_for_anyone() -> Iterator[Path]:
    """A temporary folder that the unprivileged user owns and can reach (pytest's are inside one of root's)."""
    folder = Path(tempfile.mkdtemp(prefix="stratum-test-"))
    try:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        yield folder
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)
