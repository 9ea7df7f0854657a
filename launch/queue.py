"""Slurm's commands as functions: submit, look, signal, cancel. The one place that runs them outside job scripts."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.schema.errors import StratumError

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "REQUEUE_FED")
QUESTION_LIMIT_S = 10.0
"""A question that Slurm does not answer within this time is given up: what is known without it is shown."""
ORDER_LIMIT_S = 60.0
"""For orders (submit, cancel): a busy controller may take long, and a job whose number was lost would be worse."""
ACTIVE = (*WAITING, "RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED")


class SlurmError(StratumError):
    """Slurm is not here, refused, or does not answer."""


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
    is_preempted: bool = False
    end: str = "Unknown"
    """When its time is up, as Slurm writes it: local time, ISO 8601."""

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
    answer = _slurm("sbatch", "--parsable", *options, str(script), limit_s=ORDER_LIMIT_S)
    return int(answer.strip().split(";")[0])


def look_up(numbers: Sequence[int]) -> list[QueuedJob]:
    """The jobs of these numbers that Slurm still knows (it forgets them minutes after their end)."""
    found = []
    for number in numbers:
        try:
            found.append(read_job(_slurm("scontrol", "show", "job", "--oneliner", str(number))))
        except SlurmError as error:
            if "Invalid job id" not in str(error):
                raise
    return found


def read_job(text: str) -> QueuedJob:
    """A job from what `scontrol show job --oneliner` prints about it."""
    fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return QueuedJob(
        number=int(fields.get("JobId", "0")),
        state=fields.get("JobState", "UNKNOWN"),
        reason=fields.get("Reason", "None"),
        run_time=fields.get("RunTime", "?"),
        time_limit=fields.get("TimeLimit", "?"),
        nodes=fields.get("NodeList", "(null)"),
        start=fields.get("StartTime", "Unknown"),
        restarts=int(fields.get("Restarts", "0")),
        is_preempted=fields.get("PreemptTime", "None")[:1].isdigit(),
        end=fields.get("EndTime", "Unknown"),
    )


def jobs_of_script(script: Path) -> list[int]:
    """Numbers of this user's waiting and running jobs that were submitted with this script, whoever submitted them."""
    lines = _slurm("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A %o").splitlines()
    pairs = [line.strip().split(" ", 1) for line in lines if " " in line.strip()]
    return sorted({int(number) for number, command in pairs if Path(command) == script.absolute()})


def send_signal(number: int, name: str) -> None:
    """Send a signal to the processes of a job's steps; its script does not get it."""
    _slurm("scancel", f"--signal={name}", str(number), limit_s=ORDER_LIMIT_S)


def cancel(number: int) -> None:
    """End a job now: SIGTERM to its processes, SIGKILL a few seconds later (KillWait of the cluster)."""
    _slurm("scancel", str(number), limit_s=ORDER_LIMIT_S)


def _slurm(*command: str, limit_s: float = QUESTION_LIMIT_S) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]} is not on this machine: this command talks to Slurm. Run it on a login node of the cluster "
            f"(`stratum launch slurm --dry-run` shows the script anywhere)."
        )
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"`{' '.join(command)}` has had no answer for {limit_s:g} s: Slurm's controller is down or busy"
            + (
                ". It may have been carried out all the same: look with `squeue --me`."
                if limit_s > QUESTION_LIMIT_S
                else ""
            )
        ) from None
    if result.returncode:
        raise SlurmError(f"`{' '.join(command)}` refused: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout
