"""`stratum cancel RUN`: end a Slurm run after a save; no further job follows."""

import functools
import sys
import time
from collections.abc import Sequence

from launch.lease import LeaseError, current_owner
from launch.queue import cancel, look_up, send_signal
from launch.runs import RunFolder
from launch.slurm.after_job import STOP
from launch.slurm.jobs import active_jobs, job_numbers
from launch.user_errors import exit_status
from recipes.schema.errors import RecipeError
from recipes.schema.foreign import printable
from recipes.schema.options import CommandParser, run_named

_POLL_S = 1.0


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum cancel`. -> exit status: 0 once no job of the run is left."""
    parser = CommandParser(
        "cancel",
        about="End a Slurm run: its processes finish their step, save and stop. No further job follows.\n"
        "The same `stratum launch slurm` command continues it.",
        examples="""
stratum cancel smoke                                save first, then end
stratum cancel runs/smoke --now                     end at once; the newest checkpoint stays
""",
    )
    parser.add_argument("run", metavar="RUN", help="run folder or name")
    parser.add_argument("--now", action="store_true", help="end it without a save; the newest checkpoint stays")
    parser.add_argument("--grace", type=float, default=600.0, metavar="S", help="seconds to wait for the save")
    own = parser.parse_args(list(arguments))
    if not 0 <= own.grace <= 86_400:
        parser.error(f"--grace {own.grace:g}: use 0 to 86,400 seconds")
    return exit_status(functools.partial(_cancel, own.run, save=not own.now, grace_s=own.grace))


def _remedy(run: RunFolder) -> str:
    """How to end a run that is not Slurm's."""
    try:
        found = current_owner(run.path, may_ask_slurm=False)
    except LeaseError as error:
        return printable(str(error))
    if found is None or found[1] == "dead":
        return "No process trains it, so there is nothing to cancel."
    pid, host = found[0].pid, printable(found[0].host)
    return f"It is trained by process {pid} on {host}: Ctrl-C there, or `kill -TERM {pid}`, saves and ends it."


def _cancel(name: str, *, save: bool, grace_s: float) -> int:
    run = RunFolder(run_named(name))
    if not job_numbers(run) and not (run.logs / "job.sh").is_file():
        raise RecipeError(f"{printable(str(run.path))} was not started by `stratum launch slurm`. {_remedy(run)}")
    jobs = active_jobs(run)
    if not jobs:
        sys.stderr.write(f"{printable(str(run.path))} has no waiting or running job.\n")
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
            sys.stderr.write(f"job {number}: its processes finish their step, save and stop (--now skips the save)\n")
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
