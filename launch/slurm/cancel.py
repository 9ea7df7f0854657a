"""`stratum cancel RUN`: end a Slurm run; what it has trained is saved first, and no further job follows."""

import sys
import time
from collections.abc import Sequence

from launch.queue import cancel, look_up, send_signal
from launch.runs import RunFolder
from launch.slurm.after_job import STOP
from launch.slurm.command import active_jobs
from recipes.schema.errors import StratumError
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser, run_named

_POLL_S = 1.0


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum cancel`. -> exit status: 0 when no job of the run is left."""
    parser = CommandParser(
        "cancel",
        about="End a Slurm run: its processes finish their step, save and stop; no further job follows.\n"
        "`stratum launch slurm` with the same words continues it.",
        examples="""
stratum cancel smoke                                save first, then end
stratum cancel runs/smoke --now                     end at once; the newest checkpoint stays
""",
    )
    parser.add_argument("run", metavar="RUN", help="run folder or name")
    parser.add_argument("--now", action="store_true", help="do not save first; the newest checkpoint stays")
    parser.add_argument("--grace", type=float, default=600.0, metavar="S", help="seconds to wait for the save")
    own = parser.parse_args(list(arguments))
    try:
        return _cancel(RunFolder(run_named(own.run)), save=not own.now, grace_s=own.grace)
    except StratumError as error:
        return complain(error)


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
        f"Newest checkpoint: {run.newest_checkpoint() or 'none'}. The same `stratum launch slurm` command continues.\n"
    )
    return 0
