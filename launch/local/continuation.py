"""What comes after a run's processes have ended: nothing more, the same again, or giving up. Standard library only.

One rule for `stratum launch local` and for Slurm jobs. It looks at the exit status and at whether a new checkpoint was written:

    0 at the last step                 finished
    0 before it                        paused, as run.stop_after_steps asked: in a queue the next job continues
    138 (SIGUSR1: time is nearly up)   in a queue the next job continues
    130, 143, 129 (SIGINT, SIGTERM,    someone asked it to stop: no more; but a preempted job continues, and so does one
              SIGHUP)                  that nobody asked: srun ends all ranks with SIGTERM when one is killed
    2 (recipe, data, machine)          a mistake stays one: never again by itself
    3 (NaN or infinity)                the same steps would give it again: never again by itself
    else                               a failure: again, until `restarts` of them in a row brought no new checkpoint;
                                       after a new checkpoint at once, without waiting
"""

import signal
from dataclasses import dataclass
from typing import Literal

from recipes.schema.errors import NumericsError, StratumError

USER_ERROR = StratumError.status
NUMERICS = NumericsError.status
TIME_IS_UP = 128 + signal.SIGUSR1
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, TIME_IS_UP, 128 + signal.SIGHUP)
"""Statuses of a run that saved and stopped because a signal asked."""


@dataclass(frozen=True)
class Decision:
    """What to do now, why, and how many failures in a row without a new checkpoint there are by now."""

    action: Literal["finished", "again", "stop"]
    reason: str
    failures: int = 0


def decide(
    status: int,
    *,
    at_last_step: bool,
    has_new_checkpoint: bool,
    failures: int,
    restarts: int,
    in_queue: bool,
    is_preempted: bool = False,
    was_asked: bool = True,
) -> Decision:
    """What follows an end with `status`. failures: in a row before this one; in_queue: a next job can continue; was_asked:
    a status that looks like a signal's means that someone asked the run to stop."""
    if status == 0 and (at_last_step or not in_queue):
        return Decision("finished", "finished")
    if status == USER_ERROR:
        return Decision("stop", "the recipe, the data or the machine has to be changed first", failures)
    if status == NUMERICS:
        return Decision("stop", "training gave NaN or infinity, and the same steps would give it again", failures)
    goes_on = in_queue and (status == TIME_IS_UP or (status in STOPPED and is_preempted))
    if status in STOPPED and was_asked and not goes_on:
        return Decision("stop", f"stopped by {describe(status)}", failures)
    planned = status == 0 or goes_on
    if planned and has_new_checkpoint:
        why = "preempted" if is_preempted else "time was up" if status else "paused by run.stop_after_steps"
        return Decision("again", why)
    what = "it ended before a new checkpoint was written" if planned else f"it failed with {describe(status)}"
    now = 0 if has_new_checkpoint else failures + 1
    if restarts == 0:
        return Decision("stop", f"{what}; launch.restarts=0 allows no restart", now)
    if now > restarts:
        return Decision("stop", f"{what}; {restarts} restarts in a row brought no new checkpoint", now)
    if has_new_checkpoint:
        return Decision("again", f"{what} after a new checkpoint was written")
    return Decision("again", f"{what}; restart {now} of {restarts} without a new checkpoint", now)


def describe(status: int) -> str:
    """An exit status in words: `status 1`, `SIGKILL (status 137; out of memory?)`."""
    try:
        name = signal.Signals(status - 128).name
    except ValueError:
        return f"status {status}"
    return f"{name} (status {status}{'; out of memory?' if name == 'SIGKILL' else ''})"


def shell_status(returncode: int) -> int:
    """subprocess's return code as shells and Slurm give it: 128 + the signal's number where one killed the process."""
    return 128 - returncode if returncode < 0 else returncode
