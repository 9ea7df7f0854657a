"""Runs a program written by a model, and its check, in a separate process that cannot harm the machine.

    program, check --> python -I -S confine.py in a new folder --> passed | why not

`train.evaluate.confine` says what the process gives up. The parent limits wall-clock time and the size of the folder, and removes
the folder. Code runs only with `--run-code`.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.schema.errors import BackendError
from recipes.schema.foreign import printable

_RUNNER = Path(__file__).with_name("confine.py")
_LOOK_EVERY_S = 0.02
_RESULT_BYTES = 4096
_UNCONFINED = b"unconfined: "


@dataclass(frozen=True)
class Limits:
    """The limits of a program."""

    memory_bytes: int = 1 << 30
    cpu_s: int = 10
    file_bytes: int = 1 << 20
    """Size of one file in the program's folder."""


@dataclass(frozen=True)
class Outcome:
    """The result of a program."""

    passed: bool
    why: str
    """`passed`, `timed out`, `wrote too much`, `ended early`, `killed by SIGXXX`, or the exception."""


def run(program: str, check: str, *, limits: Limits = Limits(), timeout_s: float = 15.0) -> Outcome:
    """Execute `program`, then `check` with its names. It passes if both end without an exception.

    Raises BackendError if this machine cannot confine a process; no part of the program has run then.
    """
    if sys.platform != "linux":
        raise BackendError("code written by a model runs on Linux only, where it can be confined (Landlock, seccomp).")
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="stratum-code-") as folder, tempfile.TemporaryFile() as job:
        job.write(json.dumps(
            {"program": program, "check": check, "token": token, "folder": folder, "limits": asdict(limits)}
        ).encode())  # fmt: skip
        job.seek(0)
        results, result = os.pipe()
        try:
            child = _start(folder, stdin=job.fileno(), result=result)
        finally:
            os.close(result)
        try:
            why = _wait(child, Path(folder), most_bytes=16 * limits.file_bytes, timeout_s=timeout_s)
            os.set_blocking(results, False)
            with suppress(BlockingIOError):
                said = os.read(results, _RESULT_BYTES)
        finally:
            os.close(results)
    if said.startswith(_UNCONFINED) and child.returncode == 1:
        raise BackendError(
            f"code written by a model cannot be confined on this machine: {printable(said[len(_UNCONFINED) :].decode())}. Leave "
            f"out the tasks that run code, or evaluate on a Linux machine that has Landlock and seccomp."
        )
    if said == token.encode() and why is None and child.returncode == 0:
        return Outcome(True, "passed")
    return Outcome(False, why or _reason(child.returncode, said))


def _start(folder: str, *, stdin: int, result: int) -> "subprocess.Popen[bytes]":
    """Start the runner. It has an empty environment, and only the descriptors of the job, /dev/null and the result."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_RUNNER), str(result)],
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[result],
        cwd=folder,
        env={"LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )


def _wait(child: "subprocess.Popen[bytes]", folder: Path, *, most_bytes: int, timeout_s: float) -> str | None:
    """Wait until the process ends, or kill it at a limit. -> why it was killed."""
    deadline, why = time.monotonic() + timeout_s, None
    try:
        while child.poll() is None:
            if time.monotonic() > deadline:
                why = "timed out"
            elif _size(folder) > most_bytes:
                why = "wrote too much"
            if why is not None:
                break
            time.sleep(_LOOK_EVERY_S)
    finally:
        child.kill()  # it has no children, because it cannot start processes
        child.wait()
    return why


def _size(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for path in folder.rglob("*"):
            with suppress(OSError):
                total += path.lstat().st_size + 4096
    return total


def _reason(status: int, said: bytes) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return "timed out" if name == "SIGXCPU" else f"killed by {name}"
    return printable(said.decode(errors="replace")) if status == 0 and said else "ended early"
