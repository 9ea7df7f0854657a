"""Decides what follows when a run's processes have ended: nothing, a restart, or the end of the run. No torch.

`stratum launch local` and Slurm jobs use this one rule. It depends on the exit status and on whether there is a new checkpoint:

    0 at the last step                 finished
    0 before it                        paused by run.stop_after_steps: in a queue the next job continues
    138 (SIGUSR1: near the time limit) in a queue the next job continues
    130, 143, 129 (SIGINT, SIGTERM,    a user stopped it: no restart. But a preempted job continues, and so does a job that
              SIGHUP)                  no user stopped: srun ends all ranks with SIGTERM when one is killed
    2 (recipe, data, machine)          the same error would follow: no restart
    3 (NaN or infinity)                the same steps would follow: no restart
    4 (wrong numbers of a machine)     the newest checkpoint may contain them, and the machine is still there: no restart
    other                              a failure: restart, up to `restarts` times in a row without a new checkpoint;
                                       at once if there is a new checkpoint
"""

import signal
from dataclasses import dataclass
from typing import Literal

from recipes.schema.errors import CorruptionError, NumericsError, StratumError

USER_ERROR = StratumError.status
NUMERICS = NumericsError.status
CORRUPTION = CorruptionError.status
TIME_IS_UP = 128 + signal.SIGUSR1
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, TIME_IS_UP, 128 + signal.SIGHUP)
"""Exit statuses of a run that saved and stopped after a signal."""


@dataclass(frozen=True)
class Decision:
    """What to do and why, and the number of failures in a row without a new checkpoint so far."""

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
    stop_requested: bool = True,
) -> Decision:
    """Decide what follows the exit status `status`.

    failures: failures in a row before this one. in_queue: whether a next job can continue the run. stop_requested: whether a user
    or Slurm asked the run to stop; used if `status` is that of a signal.
    """
    if status == 0 and (at_last_step or not in_queue):
        return Decision("finished", "finished")
    if status == USER_ERROR:
        return Decision("stop", "the recipe, the data or the machine must be changed first", failures)
    if status == NUMERICS:
        return Decision("stop", "training gave NaN or infinity, and the same steps would follow", failures)
    if status == CORRUPTION:
        what = "a machine computed or stored wrong numbers"
        remedy = "leave it out and remove later checkpoints (suspects.jsonl in the run's folder names it and the last good step)"
        return Decision("stop", f"{what}; {remedy}", failures)
    continues = in_queue and (status == TIME_IS_UP or (status in STOPPED and is_preempted))
    if status in STOPPED and stop_requested and not continues:
        return Decision("stop", f"stopped by {describe(status)}", failures)
    planned = status == 0 or continues
    if planned and has_new_checkpoint:
        why = "preempted" if is_preempted else "its time limit was near" if status else "paused by run.stop_after_steps"
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
    """Text for an exit status: `status 1`, `SIGKILL (status 137; out of memory?)`."""
    try:
        name = signal.Signals(status - 128).name
    except ValueError:
        return f"status {status}"
    return f"{name} (status {status}{'; out of memory?' if name == 'SIGKILL' else ''})"


def shell_status(returncode: int) -> int:
    """subprocess's return code in the form of shells and Slurm: 128 + the signal's number if a signal killed the process."""
    return 128 - returncode if returncode < 0 else returncode
