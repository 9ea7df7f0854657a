"""Slurm's commands as functions: submit, look up, signal, cancel. Only this module and job scripts run them."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.schema.errors import StratumError
from recipes.schema.foreign import printable

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "REQUEUE_FED")
QUERY_LIMIT_S = 10.0
"""Time limit for a query. After it, the caller shows what it knows without Slurm."""
ACTION_LIMIT_S = 60.0
"""Time limit for an action (submit, cancel). It is longer, because losing a job's number would be worse than waiting."""
ACTIVE = (*WAITING, "RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED")
_LONGEST_ANSWER = 2000
"""Characters of Slurm's output that an error message repeats."""


class SlurmError(StratumError):
    """Slurm is not installed on this machine, refused a command, or does not answer."""


@dataclass(frozen=True)
class QueuedJob:
    """One job, as Slurm reports it."""

    number: int
    state: str
    """PENDING, RUNNING, COMPLETED, TIMEOUT, ..."""
    reason: str
    run_time: str
    time_limit: str
    nodes: str
    start: str
    restarts: int
    is_preempted: bool = False
    end: str = "Unknown"
    """End of its time limit, as Slurm writes it: local time, ISO 8601."""

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE

    @property
    def is_waiting(self) -> bool:
        """Whether it has no processes now: not yet, or while it is suspended or requeued."""
        return self.state in WAITING


def submit(script: Path, *, options: Sequence[str] = ()) -> int:
    """Submit a script. -> job number. Raises SlurmError with sbatch's own message if it refuses."""
    answer = _slurm("sbatch", "--parsable", *options, str(script), limit_s=ACTION_LIMIT_S)
    number = answer.strip().split(";")[0]
    if not number.isdecimal():
        raise SlurmError(
            f"sbatch printed {printable(answer, most=_LONGEST_ANSWER)!r} instead of a job number. The job may have been "
            f"submitted. Check with `squeue --me`."
        )
    return int(number)


def look_up(numbers: Sequence[int]) -> list[QueuedJob]:
    """The jobs with these numbers, without those that Slurm no longer knows (some minutes after their end)."""
    found = []
    for number in numbers:
        try:
            found.append(read_job(_slurm("scontrol", "show", "job", "--oneliner", str(number))))
        except SlurmError as error:
            if "Invalid job id" not in str(error):
                raise
    return found


def read_job(text: str) -> QueuedJob:
    """A job from the output of `scontrol show job --oneliner`. Control characters become escapes."""
    # A job's name and the path of its script may contain `JobState=...`. So the name is cut out, and then the first value counts.
    text = re.sub(r"\bJobName=.*? (?=UserId=)", "", text, count=1)
    fields: dict[str, str] = {}
    for name, sign, value in (word.partition("=") for word in text.split()):
        if sign:
            fields.setdefault(name, printable(value, most=200))
    return QueuedJob(
        number=_whole(fields.get("JobId", "")),
        state=fields.get("JobState", "UNKNOWN"),
        reason=fields.get("Reason", "None"),
        run_time=fields.get("RunTime", "?"),
        time_limit=fields.get("TimeLimit", "?"),
        nodes=fields.get("NodeList", "(null)"),
        start=fields.get("StartTime", "Unknown"),
        restarts=_whole(fields.get("Restarts", "")),
        is_preempted=fields.get("PreemptTime", "None")[:1].isdigit(),
        end=fields.get("EndTime", "Unknown"),
    )


def jobs_of_script(script: Path) -> list[int]:
    """Numbers of this user's waiting and running jobs that were submitted with this script, on any machine."""
    lines = _slurm("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A %o").splitlines()
    pairs = [line.strip().split(" ", 1) for line in lines if " " in line.strip()]
    return sorted({int(number) for number, path in pairs if number.isdecimal() and Path(path) == script.absolute()})


def send_signal(number: int, name: str) -> None:
    """Send a signal to the processes of a job's steps, but not to its script."""
    _slurm("scancel", f"--signal={name}", str(number), limit_s=ACTION_LIMIT_S)


def cancel(number: int) -> None:
    """End a job now: SIGTERM to its processes, SIGKILL after the cluster's KillWait."""
    _slurm("scancel", str(number), limit_s=ACTION_LIMIT_S)


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 19 else 0


def _slurm(*command: str, limit_s: float = QUERY_LIMIT_S) -> str:
    """Standard output of one of Slurm's commands. Raises SlurmError."""
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]} is not installed on this machine, and this command needs Slurm. Run it on a login node of the "
            f"cluster (`stratum launch slurm --dry-run` shows the script anywhere)."
        )
    try:
        result = subprocess.run(command, capture_output=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"`{' '.join(command)}` got no answer for {limit_s:g} s: Slurm's controller is down or busy"
            + (". Slurm may have done it: check with `squeue --me`." if limit_s > QUERY_LIMIT_S else "")
        ) from None
    output, errors = (stream.decode(errors="replace") for stream in (result.stdout, result.stderr))
    if result.returncode:
        reason = printable(errors.strip() or output.strip(), most=_LONGEST_ANSWER)
        raise SlurmError(f"`{' '.join(command)}` refused: {reason}")
    return output
