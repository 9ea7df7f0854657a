"""`stratum status [RUN ...]`: what runs are doing, from their folders and from Slurm where it is there."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.local.failures import log_of, read_failures, tell
from launch.runs import RunFolder, runs_in, tail
from launch.slurm.command import job_numbers
from launch.slurm.queue import QueuedJob, look_up
from recipes.schema.errors import StratumError
from recipes.schema.options import CommandParser, run_named

_LOG_LINES = 8


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum status`. -> exit status."""
    parser = CommandParser(
        "status",
        about="What a run is doing: its Slurm job, step, time left, newest checkpoint, last lines, first error.",
        examples="""
stratum status                                      a table of all runs in runs/
stratum status smoke                                one run, in detail: by its name, or by its folder
stratum status runs/smoke --json                    for scripts
""",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="run folders or names (default: a table of all in runs/)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    own = parser.parse_args(list(arguments))
    try:
        runs = [RunFolder(run_named(name)) for name in own.runs] or runs_in(Path("runs"))
        if own.json:
            for run in runs:
                sys.stdout.write(json.dumps(_as_mapping(run)) + "\n")
        elif own.runs:
            for run in runs:
                sys.stdout.write(describe(run))
        else:
            _table(runs)
    except StratumError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def describe(run: RunFolder) -> str:
    """A run in a few lines."""
    lines = [str(run.path)]
    job = _newest_job(run)
    if job is not None:
        lines.append(f"  job {_job_line(job)}")
    lines.append(f"  {_progress_line(run)}")
    lines.append(f"  newest checkpoint: {run.newest_checkpoint() or 'none yet'}")
    attempts = run.attempts()
    if attempts:
        failures = read_failures(attempts[-1])
        if failures:
            lines += [f"  {line}" for line in tell(attempts[-1], failures).splitlines()]
        log = log_of(attempts[-1], 0)
        lines.append(f"  {log}:")
        lines += [f"    {line}" for line in tail(log, _LOG_LINES)]
    return "\n".join(lines) + "\n"


def _newest_job(run: RunFolder) -> QueuedJob | None:
    """The job that runs or ran last; one that still waits behind it does not count."""
    if shutil.which("scontrol") is None:
        return None
    jobs = look_up(job_numbers(run)[-8:])
    started = [job for job in jobs if job.is_active and not job.is_waiting] or [job for job in jobs if job.is_active]
    candidates = started or jobs
    return candidates[-1] if candidates else None


def _job_line(job: QueuedJob) -> str:
    text = f"{job.number} {job.state}"
    if job.is_waiting:
        text += f" ({job.reason})" + (f", expected to start {job.start}" if job.start not in ("Unknown", "") else "")
    else:
        text += f" on {job.nodes}, {job.run_time} of {job.time_limit}"
    if job.restarts:
        text += f", requeued {job.restarts} time{'s' * (job.restarts > 1)}"
    if job.state == "TIMEOUT":
        text += ". Its last save did not end in time: raise launch.slurm.save_before_end_s, then submit again"
    return text


def _progress_line(run: RunFolder) -> str:
    progress = run.progress()
    if progress is None:
        return "no step on record yet"
    total = "" if progress.total_steps is None else f" of {progress.total_steps}"
    text = f"step {progress.step}{total}, loss {progress.loss:.4f}, {progress.tokens_per_s:,.0f} tokens/s"
    if progress.total_steps is not None and progress.step >= progress.total_steps:
        return f"{text}: finished"
    if progress.seconds_left is not None:
        text += f", {_span(progress.seconds_left)} left at this pace"
    return f"{text} (last step {_span(progress.age_s)} ago)"


def _span(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def _table(runs: Sequence[RunFolder]) -> None:
    table = Table("run", "job", "progress", "checkpoint")
    for run in runs:
        job = _newest_job(run)
        table.add_row(
            str(run.path), _job_line(job) if job else "", _progress_line(run), run.newest_checkpoint() or "none yet"
        )
    console = Console()
    if runs:
        console.print(table)
    else:
        console.print("no runs in runs/")


def _as_mapping(run: RunFolder) -> dict[str, Any]:
    job, progress = _newest_job(run), run.progress()
    attempts = run.attempts()
    return {
        "run": str(run.path),
        "job": asdict(job) if job else None,
        "progress": asdict(progress) if progress else None,
        "checkpoint": run.newest_checkpoint(),
        "failures": [asdict(failure) for failure in read_failures(attempts[-1])] if attempts else [],
    }
