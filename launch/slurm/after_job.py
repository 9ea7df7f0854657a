"""`python -m launch.slurm.after_job`: a Slurm script runs it after its processes have ended. It prints one word.

    finished    the run is complete
    here        start the same processes again, on this job's nodes
    again       the run continues in the next job
    stop        the run ends

The reason, and the error of the rank that failed first, go to stderr, which is the job's log. The state for the next call
(failures in a row, the newest checkpoint, nodes on which ranks failed) is in runs/NAME/logs/continuation.json. A node on which
two attempts failed is left out (launch.slurm.left_out): a spare node of this job takes its place, or the next job gets another.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from data.system import disk
from launch.local.continuation import STOPPED, Decision, decide
from launch.local.failures import (
    RankFailure,
    by_cause,
    failure_message,
    first_failure,
    has_lost_node,
    is_consequence,
    read_failures,
    read_silent_failures,
    read_stop,
)
from launch.local.rank import LOGS
from launch.queue import QueuedJob, read_job
from launch.runs import RunFolder
from launch.slurm.left_out import EXCLUDE, leave_out, of_options, suspected
from launch.starts import note_attempt_end
from recipes.schema.foreign import read_json
from recipes.schema.typed import FieldError, build

STOP = "stop"
"""File in a run's logs: if it exists, no further job follows. `stratum cancel` creates it."""
STARTS = "starts"
"""File in a run's logs: number of starts since the last new checkpoint, written by the job script."""
NO_SUCCESSOR = "no-successor"
"""File in a run's logs: sbatch's message if it refused the next job."""
_STATE = "continuation.json"
_MARGIN_S = 120.0
"""Slurm may send its warning 60 s early and sends it only once, so a restart inside the job must happen before that."""


@dataclass(frozen=True)
class Continuation:
    """State that one job passes to the next."""

    failures: int = 0
    """Failures in a row without a new checkpoint."""
    checkpoint: str | None = None
    """Name of the newest checkpoint when the job ended."""
    nodes: dict[str, int] = field(default_factory=dict)
    """Node -> number of attempts in which a rank on it failed first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m launch.slurm.after_job`. -> 0"""
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm.after_job", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--status", type=int, required=True, help="exit status of srun")
    parser.add_argument("--steps", type=int, required=True, help="the recipe's last step")
    parser.add_argument("--restarts", type=int, required=True, help="launch.restarts of the recipe")
    parser.add_argument("--save-before-end-s", type=float, default=0.0, help="launch.slurm.save_before_end_s")
    parser.add_argument("--timeout-s", type=float, default=0.0, help="launch.timeout_s")
    parser.add_argument("--spares", action="store_true", help="nodes of this job can take the place of others")
    parser.add_argument(
        "--ended", type=float, help="when the processes had ended, in seconds since the epoch; default: now"
    )
    parser.add_argument("--job", default="", help="what `scontrol show job --oneliner` says about this job")
    own = parser.parse_args(arguments)
    run, logs, job = RunFolder(own.run), Path(os.environ[LOGS]), read_job(own.job)
    failures = by_cause(logs, read_failures(logs) + read_silent_failures(logs))
    is_lost = job.reason == "NodeDown" or has_lost_node(logs)
    failed = first_failure(failures, timeout_s=own.timeout_s)
    if failed is None and (failures or is_lost):
        failed = own.ended  # no rank could write when
    note_attempt_end(run.logs, status=own.status, failed=failed, ended=own.ended)
    decision = decide_after_job(
        run,
        own.status,
        failures=failures,
        stopped=read_stop(logs),
        job=job,
        steps=own.steps,
        restarts=own.restarts,
        is_lost=is_lost,
        blamed="" if not failures or is_lost or is_consequence(logs, failures[0]) else failures[0].host,
    )
    if failures and decision.action != "finished":
        sys.stderr.write(failure_message(logs, failures) + "\n")
    action: str = decision.action
    is_broken = bool(failures) or (own.spares and is_lost)
    if action == "again" and is_broken and _may_restart_here(run, failures, job, own):
        action = "here"
    sys.stderr.write(f"{action}: {decision.reason}; newest checkpoint: {run.newest_checkpoint()}\n")
    sys.stdout.write(action + "\n")
    return 0


def decide_after_job(
    run: RunFolder,
    status: int,
    *,
    failures: Sequence[RankFailure],
    stopped: int | None,
    job: QueuedJob,
    steps: int,
    restarts: int,
    is_lost: bool,
    blamed: str,
) -> Decision:
    """Decide what follows the end of a job's processes, and store the state for the next decision.

    status: exit status of srun, the highest of all ranks. failures: causes first. stopped: exit status of the ranks that stopped
    after a signal; None if no rank did. job: Slurm's record of the job. is_lost: whether a node failed. blamed: the node on which
    the failure began; "" if no rank there could say so.
    """
    before, now = _read(run), run.newest_checkpoint()
    is_cancelled = not is_lost and not job.is_preempted and job.state in ("CANCELLED", "COMPLETING")
    if failures:
        status = failures[0].status  # srun's status may come from a rank that failed later
    elif status == 0 or (status in STOPPED and stopped is not None):
        status = stopped or status
    # If one rank is killed, srun sends SIGTERM to the others, and it kills ranks that are still starting. So status 143 alone
    # does not mean that a user stopped the run.
    stop_requested = stopped is not None or is_cancelled or job.is_preempted
    decision = decide(
        status,
        at_last_step=run.checkpoint_step() >= steps,
        has_new_checkpoint=now not in (None, before.checkpoint),
        failures=before.failures,
        restarts=restarts,
        in_queue=True,
        is_preempted=job.is_preempted,
        stop_requested=stop_requested and not is_lost,
    )
    if decision.action == "again" and is_lost:
        decision = replace(decision, reason=f"a node was lost; {decision.reason}")
    if decision.action == "again" and is_cancelled:
        decision = Decision("stop", "the job was cancelled, or reached its time limit before the save was complete")
    if decision.action == "again" and (run.logs / STOP).exists():
        decision = Decision("stop", "`stratum cancel` asked for no further job")
    nodes = dict(before.nodes)
    if blamed and decision.action == "again":
        nodes[blamed] = nodes.get(blamed, 0) + 1
    _write(run, Continuation(decision.failures, now, nodes))
    leave_out(run.logs, (node for node, count in nodes.items() if count > 1))
    return decision


def _may_restart_here(run: RunFolder, failures: Sequence[RankFailure], job: QueuedJob, own: argparse.Namespace) -> bool:
    """Whether this job can restart the ranks: no node was lost or failed twice, or the job has spares (its script then looks for
    enough nodes), and Slurm's warning before the end is not due."""
    if job.state != "RUNNING" or job.is_preempted or job.reason == "NodeDown":
        return False
    if not own.spares and _read(run).nodes.get(failures[0].host, 0) > 1:
        return False
    with contextlib.suppress(ValueError):
        left_s = time.mktime(time.strptime(job.end, "%Y-%m-%dT%H:%M:%S")) - time.time()
        return left_s > own.save_before_end_s + _MARGIN_S
    return True  # no time limit


def reset_state(run: RunFolder, *, options: str = "") -> None:
    """Delete the state of earlier jobs and of an earlier `stratum cancel`, before the run is submitted again.

    Nodes stay left out if the user's sbatch options or the run's suspects.jsonl name them.
    """
    for name in (STOP, EXCLUDE, STARTS, NO_SUCCESSOR):
        (run.logs / name).unlink(missing_ok=True)
    leave_out(run.logs, (*of_options(options), *suspected(run.path)))
    _write(run, Continuation(checkpoint=run.newest_checkpoint()))


def _read(run: RunFolder) -> Continuation:
    """The state that the last job stored; the initial state if it is missing or cannot be read."""
    try:
        return build(Continuation, read_json(run.logs / _STATE), "continuation")
    except (OSError, ValueError, FieldError):
        return Continuation()


def _write(run: RunFolder, state: Continuation) -> None:
    disk.write_text(run.logs / _STATE, json.dumps(asdict(state)))


if __name__ == "__main__":
    sys.exit(main())
