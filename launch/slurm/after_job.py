"""`python -m launch.slurm.after_job`: run by a Slurm script when its processes have ended; prints `finished`, `again` or `stop`.

Why it decided so, and the error of the rank that failed first, go to stderr: into the job's log. What it must remember
between jobs (failures in a row, the checkpoint there was) lies in runs/NAME/logs/continuation.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.system import disk
from launch.local.continuation import Decision, decide
from launch.local.failures import read_failures, read_stop, tell
from launch.local.rank import LOGS
from launch.runs import RunFolder

STOP = "stop"
"""Name of the file in a run's logs by which `stratum cancel` says that no job is to follow."""
_STATE = "continuation.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m launch.slurm.after_job`. -> 0"""
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm.after_job", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--status", type=int, required=True, help="exit status of srun")
    parser.add_argument("--steps", type=int, required=True, help="the recipe's last step")
    parser.add_argument("--restarts", type=int, required=True, help="launch.restarts of the recipe")
    parser.add_argument("--preempted", type=int, default=0, help="1 where Slurm took the nodes for a more urgent job")
    own = parser.parse_args(arguments)
    run = RunFolder(own.run)
    logs = Path(os.environ[LOGS])
    status = own.status or read_stop(logs) or 0
    failures = read_failures(logs)
    if failures:
        status = failures[0].status  # srun gives the highest of all ranks, which need not be the first
        sys.stderr.write(tell(logs, failures) + "\n")
    decision = after(run, status, steps=own.steps, restarts=own.restarts, is_preempted=own.preempted > 0)
    sys.stderr.write(f"{decision.action}: {decision.reason}; newest checkpoint: {run.newest_checkpoint()}\n")
    sys.stdout.write(decision.action + "\n")
    return 0


def after(run: RunFolder, status: int, *, steps: int, restarts: int, is_preempted: bool) -> Decision:
    """Decide what follows a job's end, and remember what the next decision needs."""
    failures, before = _read_state(run)
    now = run.newest_checkpoint()
    decision = decide(
        status,
        at_last_step=run.checkpoint_step() >= steps,
        has_new_checkpoint=now not in (None, before),
        failures=failures,
        restarts=restarts,
        in_queue=True,
        is_preempted=is_preempted,
    )
    if decision.action == "again" and (run.logs / STOP).exists():
        decision = Decision("stop", "`stratum cancel` asked for no further job")
    _write_state(run, failures=decision.failures, checkpoint=now)
    return decision


def start_afresh(run: RunFolder) -> None:
    """Forget earlier failures and an earlier `cancel`: the run is submitted again."""
    (run.logs / STOP).unlink(missing_ok=True)
    _write_state(run, failures=0, checkpoint=run.newest_checkpoint())


def _read_state(run: RunFolder) -> tuple[int, str | None]:
    """(failures in a row, newest checkpoint) as the last job left them."""
    try:
        state = json.loads((run.logs / _STATE).read_text())
        return int(state["failures"]), state["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None


def _write_state(run: RunFolder, *, failures: int, checkpoint: str | None) -> None:
    disk.write_text(run.logs / _STATE, json.dumps({"failures": failures, "checkpoint": checkpoint}))


if __name__ == "__main__":
    sys.exit(main())
