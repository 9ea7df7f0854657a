"""Slurm's commands as functions: submit, look, signal, cancel. The one place that runs them outside job scripts."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.schema.errors import StratumError

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "REQUEUE_FED")
ACTIVE = (*WAITING, "RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED")


class SlurmError(StratumError):
    """Slurm is not here, or refused."""


@dataclass(frozen=True)
class QueuedJob:
    """One job as Slurm knows it."""

    number: int
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, TIMEOUT, ..."""
    reason: str
    run_time: str
    time_limit: str
    nodes: str
    start: str
    restarts: int
    dependency: str

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE

    @property
    def is_waiting(self) -> bool:
        """Whether it has no processes (yet, or for now)."""
        return self.state in WAITING


def submit(script: Path, *, options: Sequence[str] = ()) -> int:
    """Submit a script. -> job number. SlurmError with sbatch's own words where it refuses."""
    return int(_slurm("sbatch", "--parsable", *options, str(script)).strip().split(";")[0])


def look_up(numbers: Sequence[int]) -> list[QueuedJob]:
    """The jobs of these numbers that Slurm still knows (it forgets them minutes after their end)."""
    found = []
    for number in numbers:
        try:
            text = _slurm("scontrol", "show", "job", "--oneliner", str(number))
        except SlurmError as error:
            if "Invalid job id" in str(error):
                continue
            raise
        fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
        found.append(
            QueuedJob(
                number=number,
                state=fields.get("JobState", "UNKNOWN"),
                reason=fields.get("Reason", "None"),
                run_time=fields.get("RunTime", "?"),
                time_limit=fields.get("TimeLimit", "?"),
                nodes=fields.get("NodeList", "(null)"),
                start=fields.get("StartTime", "Unknown"),
                restarts=int(fields.get("Restarts", "0")),
                dependency=fields.get("Dependency", "(null)"),
            )
        )
    return found


def send_signal(number: int, name: str) -> None:
    """Send a signal to the processes of a job's steps; its script does not get it."""
    _slurm("scancel", f"--signal={name}", str(number))


def cancel(number: int) -> None:
    """End a job now: SIGTERM to its processes, SIGKILL a few seconds later (KillWait of the cluster)."""
    _slurm("scancel", str(number))


def _slurm(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]} is not on this machine: this command talks to Slurm. Run it on a login node of the cluster "
            f"(`stratum launch slurm --dry-run` shows the script anywhere)."
        )
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SlurmError(f"`{' '.join(command)}` refused: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout
