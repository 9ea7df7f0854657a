"""`python -m launch cancel RUN`: end a Slurm run; what it has trained is saved first, and no further job follows."""

import argparse
import sys
import time
from collections.abc import Sequence

from launch.queue import cancel, look_up, send_signal
from launch.runs import RunFolder, find_run
from launch.slurm.after_job import STOP
from launch.slurm.command import active_jobs
from recipes.schema.errors import StratumError

_POLL_S = 1.0


def main(arguments: Sequence[str]) -> int:
    """Entry point of `python -m launch cancel`. -> exit status: 0 when no job of the run is left."""
    parser = argparse.ArgumentParser(
        prog="python -m launch cancel",
        description="End a Slurm run: its processes finish their step, save and stop; no further job follows. "
        "`python -m launch slurm` with the same words continues it.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder or name")
    parser.add_argument("--now", action="store_true", help="do not save first; the newest checkpoint stays")
    parser.add_argument("--grace", type=float, default=600.0, metavar="S", help="seconds to wait for the save (600)")
    own = parser.parse_args(list(arguments))
    try:
        return _cancel(find_run(own.run), save=not own.now, grace_s=own.grace)
    except StratumError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _cancel(run: RunFolder, *, save: bool, grace_s: float) -> int:
    jobs = active_jobs(run)
    if not jobs:
        sys.stderr.write(f"No job of {run.path} waits or runs.\n")
        return 0
    (run.logs / STOP).touch()
    for job in jobs:
        if job.is_waiting or not save:
            cancel(job.number)
            sys.stderr.write(f"job {job.number}: cancelled\n")
    running = [job.number for job in jobs if not job.is_waiting]
    if save:
        for number in running:
            send_signal(number, "USR1")
            sys.stderr.write(f"job {number}: its processes finish their step, save and stop (--now does not wait)\n")
    deadline = time.monotonic() + grace_s
    while any(job.is_active for job in look_up(running)):
        if time.monotonic() > deadline:
            deadline += grace_s
            for number in running:
                cancel(number)
            sys.stderr.write(f"still running after {grace_s:g} s: cancelled without a save\n")
        time.sleep(_POLL_S)
    sys.stderr.write(
        f"Newest checkpoint: {run.newest_checkpoint() or 'none'}. The same `launch slurm` command continues.\n"
    )
    return 0
