"""Run tests as an unprivileged user: root may read and delete everything, so permission errors do not occur.

with folder_for_anyone() as folder, unprivileged(): ...      as uid 65534 if the tests run as root, else as they run
run_unprivileged("tests/resume/test_signals.py", "-k", "echo")  pytest in one forked process without root privileges
"""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import IN_EVERY_RANK

from data.native import rows
from train.native import fingerprint, kernel_versions, kernels, quantize

NOBODY = 65534
ROOT = Path(__file__).parents[1]


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


def give_to_nobody(folder: Path) -> None:
    """Make the unprivileged user the owner of a folder and of all that is in it."""
    if os.geteuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def load_kernels() -> None:
    """Load the compiled kernels. Forked ranks inherit them; without this each rank of another user compiles them again, because
    it cannot use root's cache."""
    for name in kernel_versions.NAMES:
        kernels.library(name)
    for load in (quantize.library, rows.library, fingerprint.kernels):
        load()


def run_unprivileged(*arguments: str) -> tuple[int, str]:
    """Run pytest with these arguments in a forked process that has given up root privileges for good. -> its exit
    status and output. Nothing is imported again, so the interpreter's files need not be readable to the other user."""
    for module in IN_EVERY_RANK:
        importlib.import_module(module)
    load_kernels()
    with folder_for_anyone() as folder:
        output = folder / "output"
        pid = os.fork()
        if pid == 0:
            _pytest_as_nobody(folder, output, arguments)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status, output.read_text()


def _pytest_as_nobody(folder: Path, output: Path, arguments: tuple[str, ...]) -> None:
    """Runs in the child and never returns."""
    status = 1
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder)}
        tempfile.tempdir = None  # read TMPDIR again
        os.chdir(ROOT)
        status = pytest.main(["-q", "-s", "-m", "not slow and not gpu", f"--basetemp={folder}/pytest", *arguments])
        sys.stdout.flush()
    finally:
        os._exit(status)
