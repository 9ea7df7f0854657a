"""When the processes of a run were started and ended, as launchers know it: RUN/logs/starts.jsonl. No torch.

    {"kind": "launch" | "submission", "time": ...}            the command was started; the job was submitted
    {"kind": "attempt", "time": ...}                          processes are started; before it: the queue, or a back-off
    {"kind": "attempt_end", "time": ..., "status": 137, "failed": ...}      all have ended; when the first had failed

With metrics.jsonl these are all events of a run's life (`launch.time_spent`). Slurm's job scripts append the same lines.
A record that cannot be written must not end a run, so it is left out.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from recipes.schema.run_folder import Line, read_metrics

STARTS = "starts.jsonl"
"""File in a run's logs."""


def note_launch(logs: Path) -> None:
    """The command of this process was started: at the start of the process, before its imports."""
    _note(logs, "launch", time=time.time() - process_age_s())


def note_submission(logs: Path) -> None:
    """A job of the run was submitted."""
    _note(logs, "submission", time=time.time())


def note_attempt(logs: Path) -> None:
    """Processes are being started."""
    _note(logs, "attempt", time=time.time())


def note_attempt_end(logs: Path, *, status: int, failed: float | None, ended: float | None = None) -> None:
    """All processes have ended, now or at `ended`. failed: when the first had failed; None: none did."""
    _note(logs, "attempt_end", time=time.time() if ended is None else ended, status=status, failed=failed)


def starts_of(run: Path) -> list[Line]:
    """The record of a run's folder; [] without one."""
    try:
        return read_metrics(run / "logs" / STARTS)
    except OSError:
        return []


def process_age_s() -> float:
    """Seconds since this process was started or forked; 0 on systems without /proc."""
    try:
        text = Path("/proc/self/stat").read_text()
    except OSError:
        return 0.0
    ticks = int(text.rpartition(")")[2].split()[19])
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _note(logs: Path, kind: str, **fields: Any) -> None:
    line = json.dumps({"kind": kind, **{name: value for name, value in fields.items() if value is not None}})
    with contextlib.suppress(OSError):
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / STARTS).open("a") as stream:
            stream.write(line + "\n")
