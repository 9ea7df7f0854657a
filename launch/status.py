"""`stratum status [RUN ...]`: the state of runs, from their folders and, if it is installed, from Slurm."""

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from data.system.console import open_console, print_table
from launch.lease import LeaseError, current_owner
from launch.local.failures import failure_message, log_of, read_failures
from launch.queue import QueuedJob, SlurmError, look_up
from launch.runs import RunFolder, by_age, runs_in
from launch.slurm.after_job import NO_SUCCESSOR
from launch.slurm.jobs import job_numbers
from launch.starts import starts_of
from launch.time_spent import goodput, time_spent, totals
from launch.user_errors import exit_status
from recipes.schema import units
from recipes.schema.foreign import printable
from recipes.schema.options import CommandParser, run_named
from recipes.schema.run_folder import METRICS, last_texts, read_metrics

_LOG_LINES = 8
_STARTING_S = 120.0
"""A run without a recorded step may still be starting if its logs are newer than this."""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum status`. -> exit status."""
    parser = CommandParser(
        "status",
        about="What a run is doing: its Slurm job, step, time left, newest checkpoint, last lines, first error.",
        examples="""
stratum status                                      a table of all runs in runs/
stratum status smoke                                one run in detail, by its name or its folder
stratum status smoke --watch                        repeat every 10 s, until Ctrl-C
stratum status runs/smoke --json                    for scripts
""",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="run folders or names (default: a table of all in runs/)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per run")
    parser.add_argument(
        "--watch", nargs="?", const=10.0, type=float, metavar="S", help="repeat every S seconds (10), until Ctrl-C"
    )
    options = parser.parse_args(list(arguments))
    if options.watch is not None and not 0 <= options.watch <= 86_400:
        parser.error(f"--watch {options.watch:g} is out of range. Use 0 to 86,400 seconds.")
    return exit_status(lambda: _show(options.runs, as_json=options.json, every_s=options.watch))


def _show(names: Sequence[str], *, as_json: bool, every_s: float | None) -> int:
    try:
        while True:
            text = _report(names, as_json=as_json)
            clear = "\x1b[2J\x1b[H" if every_s is not None and sys.stdout.isatty() else ""
            sys.stdout.write(clear + text)
            sys.stdout.flush()
            if every_s is None:
                return 0
            time.sleep(max(1.0, every_s))
    except KeyboardInterrupt:
        return 0


def _report(names: Sequence[str], *, as_json: bool) -> str:
    runs, queue = [RunFolder(run_named(name)) for name in names] or runs_in(Path("runs")), Queue()
    if as_json:
        return "".join(json.dumps(_as_mapping(run, queue)) + "\n" for run in runs)
    text = "".join(describe(run, queue) for run in runs) if names else _table(runs, queue)
    return text + (f"{queue.problem}. The above is from the folders only.\n" if queue.problem else "")


class Queue:
    """What Slurm reports about runs. If it does not answer once, `problem` is set and Slurm is not queried again."""

    def __init__(self) -> None:
        self.problem = ""

    def newest_job(self, run: RunFolder) -> QueuedJob | None:
        """The run's newest job with processes; else its newest waiting job; else its last one. None without a job or an
        answer."""
        numbers = job_numbers(run)
        if shutil.which("scontrol") is None or self.problem or not numbers:
            return None
        try:
            jobs = look_up(numbers[-8:])
        except SlurmError as error:
            self.problem = str(error)
            return None
        active = [job for job in jobs if job.is_active]
        candidates = [job for job in active if not job.is_waiting] or active or jobs
        return candidates[-1] if candidates else None


def describe(run: RunFolder, queue: Queue) -> str:
    """A run in a few lines. Control characters in names and logs are shown as escapes."""
    lines = [printable(str(run.path))]
    job = queue.newest_job(run)
    if job is not None:
        lines.append(f"  job {_job_line(job)}")
    lines.append(f"  {_progress_line(run)}")
    lines.append(f"  {_state(run, job, queue)}")
    if spent := _time_spent(run):
        lines.append(f"  {_time_line(spent)}")
    refusal = last_texts(run.logs / NO_SUCCESSOR, 3)
    if refusal:
        lines.append(
            f"  the next job of the chain could not be submitted from a compute node: {printable(' '.join(refusal))}"
        )
    lines.append(f"  newest checkpoint: {run.newest_checkpoint() or 'none yet'}")
    if storage := run.storage_line():
        lines.append(f"  {printable(storage)}")
    attempts = run.attempts()
    if attempts:
        failures = read_failures(attempts[-1])
        if failures:
            lines += [f"  {line}" for line in failure_message(attempts[-1], failures).splitlines()]
        log = log_of(attempts[-1], 0)
        lines.append(f"  {printable(str(log))}:")
        lines += [f"    {printable(line)}" for line in last_texts(log, _LOG_LINES)]
    return "\n".join(lines) + "\n"


def _state(run: RunFolder, job: QueuedJob | None, queue: Queue) -> str:
    """Whether a process trains the run, or a job will, by its lease and its job. Otherwise the run is dead, or finished."""
    try:
        found = current_owner(run.path, may_ask_slurm=not queue.problem)
    except LeaseError as error:
        return f"unknown: {printable(str(error))}"
    if found is not None and found[1] == "alive":
        return f"trained by {found[0].describe()}"
    if job is not None and job.is_active:
        return "waits for its job" if job.is_waiting else "its job runs; no trainer owns the run yet, or it has ended"
    progress = run.progress()
    if progress is not None and progress.total_steps is not None and progress.step >= progress.total_steps:
        return "finished"
    if queue.problem and job_numbers(run):
        return "no trainer owns it; whether it has a waiting job is unknown, because Slurm did not answer"
    logs = by_age(path for folder in run.attempts()[-1:] for path in folder.glob("rank-*.log"))
    if logs and time.time() - logs[-1].stat().st_mtime < _STARTING_S and progress is None:
        return "is starting, or has just ended"
    how = "no process trains it"
    if found:
        how = "its trainer ended without releasing the run (killed, or its machine was lost)"
    return f"dead: {how}, and it has no waiting or running job. The command that started it continues from the newest checkpoint"


def _job_line(job: QueuedJob) -> str:
    text = f"{job.number} {job.state}"
    if job.is_waiting:
        text += f" ({job.reason})" + (f", expected to start {job.start}" if job.start not in ("Unknown", "") else "")
    else:
        text += f" on {job.nodes}, {job.run_time} of {job.time_limit}"
    if job.restarts:
        text += f", requeued {job.restarts} time{'s' * (job.restarts > 1)}"
    if job.state == "TIMEOUT":
        text += ". Its last save did not finish in time: raise launch.slurm.save_before_end_s, then submit again"
    return text


def _progress_line(run: RunFolder) -> str:
    progress = run.progress()
    if progress is None:
        return "no step recorded yet"
    total = "" if progress.total_steps is None else f" of {progress.total_steps}"
    text = f"step {progress.step}{total}, loss {progress.loss:.4f}, {progress.tokens_per_s:,.0f} tokens/s"
    if progress.skipped_steps or progress.rollbacks:
        text += f", {progress.skipped_steps} steps skipped, {progress.rollbacks} rollbacks"
    if progress.total_steps is not None and progress.step >= progress.total_steps:
        return f"{text}: finished"
    if progress.seconds_left is not None:
        text += f", {units.clock(progress.seconds_left)} left at this pace"
    return f"{text} (last step {units.clock(progress.age_s)} ago)"


def _time_spent(run: RunFolder) -> dict[str, float]:
    """Seconds of the wall time by kind, over all starts; {} without a record. It reads all of metrics.jsonl."""
    try:
        return totals(time_spent(read_metrics(run.path / METRICS), starts_of(run.path)))
    except OSError:
        return {}


def _time_line(spent: dict[str, float]) -> str:
    whole = sum(spent.values())
    shares = ", ".join(f"{printable(kind)} {100 * seconds / whole:.1f} %" for kind, seconds in list(spent.items())[:4])
    return f"goodput {100 * goodput(spent):.1f} % of {units.span(whole)}: {shares}"


def _table(runs: Sequence[RunFolder], queue: Queue) -> str:
    if not runs:
        return "no runs in runs/\n"
    console = open_console(wraps=True)
    table = Table("run", "job", "progress", "state", "checkpoint")
    for run in runs:
        job = queue.newest_job(run)
        state = re.split(r"[:;] | \(", _state(run, job, queue))[0]
        table.add_row(
            printable(str(run.path)),
            _job_line(job) if job else "",
            _progress_line(run),
            state,
            run.newest_checkpoint() or "none yet",
        )
    with console.capture() as captured:
        print_table(console, table)
    return captured.get()


def _as_mapping(run: RunFolder, queue: Queue) -> dict[str, Any]:
    job, progress = queue.newest_job(run), run.progress()
    spent = _time_spent(run)
    attempts = run.attempts()
    return {
        "run": str(run.path),
        "job": asdict(job) if job else None,
        "progress": asdict(progress) if progress else None,
        "state": _state(run, job, queue),
        "slurm": queue.problem or None,
        "no_successor": " ".join(last_texts(run.logs / NO_SUCCESSOR, 3)) or None,
        "checkpoint": run.newest_checkpoint(),
        "storage": run.storage_line() or None,
        "goodput": goodput(spent) if spent else None,
        "seconds": spent,
        "failures": [asdict(failure) for failure in read_failures(attempts[-1])] if attempts else [],
    }
