"""`stratum launch local`: run 1..N processes on this machine until the run is finished.

    words --compose--> recipe --checks--> attempt (launch.local.supervise) --failed--> wait --> attempt --> ... --> exit status

Each attempt resumes from the newest checkpoint. The exit status is that of the trainer (docs/launch.md), or of the rank that
failed first.
"""

import functools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from data.system.retry import wait_s
from launch.children import python_module, rank_environment
from launch.compose import checked_layout, compose, run_folder
from launch.facts import fp32_block_scales_of
from launch.lease import LeaseError, current_owner, refusal
from launch.local.continuation import decide
from launch.local.failing_rank import Team
from launch.local.failures import failure_message, stacks_message
from launch.local.supervise import StopRequest, run_attempt, say
from launch.local.warm_process import WarmProcess
from launch.runs import RunFolder
from launch.starts import note_attempt, note_attempt_end, note_launch
from launch.user_errors import exit_status
from recipes.schema import units
from recipes.schema.errors import RecipeError
from recipes.schema.facts import Machine, missing_packages
from recipes.schema.launch_rules import environment_of, local_problems
from recipes.schema.options import CommandParser
from recipes.schema.recipe import Recipe

_MOST_WAIT_S = 300.0
"""Longest wait before a restart."""
_IMPORTS = ("torch._dynamo", "train.run")
"""What every rank imports: most of the time of a start."""
_EXAMPLES = """
stratum launch local -cn smoke                                          as many processes as the recipe needs
stratum launch local -cn smoke run.name=two parallel.tensor=2           two processes
stratum launch local -cn smoke run.name=four --nproc 4 parallel.tensor=2 parallel.pipeline=2
stratum launch local -cn smoke --show all run.name=pair --nproc 2       output of all ranks, each line with its rank
"""
_NOTES = """
Ctrl-C (or SIGTERM, SIGUSR1): all processes finish their step, save and stop; the same command continues. A second signal
kills them. After a failure the run starts again from its newest checkpoint (launch.restarts, launch.backoff_s). Logs of
every rank: runs/NAME/logs/. Exit status: 0 finished, 2 an error to fix in the recipe or the data, 130/143/138 stopped.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum launch local`. -> exit status."""
    parser = CommandParser(
        "launch local",
        about="Run a recipe on 1..N processes of this machine, with restarts.",
        examples=_EXAMPLES,
        notes=_NOTES,
        recipe=True,
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="processes; the same as launch.processes=N")
    parser.add_argument("--show", default="0", metavar="RANKS", help="ranks shown live, as in 0,3, or all")
    own, words = parser.parse_recipe(arguments)
    if own.nproc is not None:
        words.append(f"launch.processes={own.nproc}")
    recipe = compose(words, program="launch local")
    if isinstance(recipe, int):
        return recipe
    return exit_status(functools.partial(_launch, recipe, words, show=own.show))


def _launch(recipe: Recipe, words: Sequence[str], *, show: str) -> int:
    """Check everything, then run. -> exit status."""
    gpus = 0 if recipe.run.device == "cpu" else _gpus()
    processes = recipe.launch.processes or gpus or _degrees(recipe)
    machine = Machine(has_gpu=gpus > 0, missing=missing_packages(), fp32_block_scales=fp32_block_scales_of(recipe))
    more = local_problems(recipe, processes=processes, gpus=gpus)
    layout = checked_layout(recipe, processes=processes, machine=machine, more=more, here=True)
    environment = _environment(recipe, processes)
    shown = _shown(show, processes)
    run = run_folder(recipe)
    refuse_second_trainer(run)
    say(f"{processes} process{'es' * (processes > 1)} ({layout.describe()}), logs in {run.logs}")
    return run_to_end(
        python_module("launch.local.rank", "train", *words),
        recipe=recipe,
        run=run,
        processes=processes,
        environment=environment,
        shown=shown,
        modules=() if gpus else _IMPORTS,  # CUDA does not work in a fork of a process that has called it; not tried
        devices=tuple(_visible_gpus()[:gpus]) if gpus else (),
    )


def run_to_end(
    command: list[str],
    *,
    recipe: Recipe,
    run: RunFolder,
    processes: int,
    environment: dict[str, str],
    shown: frozenset[int],
    modules: Sequence[str] = (),
    devices: tuple[str, ...] = (),
) -> int:
    """Start attempts until the run is finished or stopped, or must not be restarted. -> exit status.

    modules: what a process imports that forks all ranks (launch.local.warm_process); empty: each rank is a new process. devices:
    visible GPUs, by name.
    """
    failures, grow_at = 0, None
    team = Team(processes, devices)
    copies = recipe.run.memory_copies.every_steps > 0
    note_launch(run.logs)
    use_terminal = len(shown) == 1 and recipe.telemetry.progress and sys.stdout.isatty() and sys.stderr.isatty()
    with StopRequest() as stop, ExitStack() as stack:
        warm = stack.enter_context(WarmProcess(modules, environment)) if modules else None
        while True:
            before, step_before = run.newest_checkpoint(), run.step()
            logs = _new_folder(run.logs)
            note_attempt(run.logs)
            end = run_attempt(
                command,
                processes=team.processes,
                environment=environment,
                logs=logs,
                shown=shown,
                grace_s=recipe.launch.grace_s,
                stop=stop,
                use_terminal=use_terminal,
                warm=warm,
                grow_at=grow_at,
            )
            note_attempt_end(run.logs, status=end.status, failed=end.failed_at(timeout_s=recipe.launch.timeout_s))
            if warm is not None and warm.has_died:
                say("the process that forks the ranks has died, so they got SIGTERM. The next ranks are new processes.")
                warm = None
            if end.failures:
                say(failure_message(logs, end.failures, seen_live=shown))
            if stacks := stacks_message(logs, end.hung):
                say(stacks)
            if end.status == 0 or stop.received:
                return end.status
            if end.may_grow and (grown := team.grown()) is not None:
                (team, text), grow_at, failures = grown, None, 0
                say(f"after {recipe.launch.regrow_s:g} s (launch.regrow_s): {text}")
                environment = _with_devices(environment, team)
                continue
            has_progress = run.newest_checkpoint() not in (None, before) or (copies and run.step() > step_before)
            if end.failures:
                team = team.after_failure(end.failures[0].rank, has_progress=has_progress)
            decision = decide(
                end.status,
                at_last_step=run.checkpoint_step() >= recipe.run.steps,
                has_new_checkpoint=has_progress,
                failures=failures,
                restarts=recipe.launch.restarts,
                in_queue=False,
            )
            failures = decision.failures
            if decision.action != "again":
                say(f"no restart: {decision.reason}")
                return end.status
            changed = team.without_suspect(recipe, may_shrink=run.newest_checkpoint() is not None)
            if changed is not None:
                (team, text), failures = changed, 0
                say(text)
                environment = _with_devices(environment, team)
                grow_at = time.monotonic() + recipe.launch.regrow_s if team.full is not None else None
            delay = wait_s(failures, first_s=recipe.launch.backoff_s, most_s=_MOST_WAIT_S)
            from_where = run.newest_checkpoint() or "the beginning"
            if copies:
                from_where = f"copies in memory, or from {from_where},"
            when = f"in {delay:g} s (Ctrl-C cancels)" if delay else "at once"
            say(f"{decision.reason}; starting again from {from_where} {when}")
            if stop.wait(delay):
                return end.status


def _with_devices(environment: dict[str, str], team: Team) -> dict[str, str]:
    """The environment of the ranks, which see the team's GPUs."""
    return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(team.devices)} if team.devices else {})


def refuse_second_trainer(run: RunFolder) -> None:
    """Raise LeaseError if a trainer owns the run.

    The trainer refuses too (train.resilience.lease); this check saves starting the processes.
    """
    found = current_owner(run.path)
    if found is not None and found[1] == "alive":
        raise LeaseError(refusal(found[0], what=str(run.path)))


def _degrees(recipe: Recipe) -> int:
    return recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context


def _gpus() -> int:
    """Number of GPUs that processes on this machine can use."""
    return len(_visible_gpus())


def _visible_gpus() -> list[str]:
    """Their names in CUDA_VISIBLE_DEVICES, or their numbers, from the driver's files, without CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(driver.iterdir())))] if driver.is_dir() else []


def _environment(recipe: Recipe, processes: int) -> dict[str, str]:
    """Environment of every process, without its rank. Variables that are already set keep their values."""
    threads = recipe.run.threads or max(1, len(os.sched_getaffinity(0)) // processes)
    defaults = rank_environment(recipe, threads=threads)
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # otherwise gloo uses the host name, which need not resolve to this host
    return {**defaults, **os.environ, **environment_of(recipe.launch.environment)}


def _shown(text: str, processes: int) -> frozenset[int]:
    if text == "all":
        return frozenset(range(processes))
    try:
        ranks = frozenset(int(word) for word in text.split(","))
    except ValueError:
        raise RecipeError(f"--show={text} is not a list of ranks. Give ranks as in 0,3, or all.") from None
    beyond = sorted(rank for rank in ranks if not 0 <= rank < processes)
    if beyond:
        raise RecipeError(f"--show={text}: with {processes} processes there is no rank {beyond[0]}")
    return ranks


def _new_folder(logs: Path) -> Path:
    """A folder name for this attempt's logs that does not exist yet."""
    stem, number = f"local-{units.stamp()}", 1
    while (logs / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return logs / (stem if number == 1 else f"{stem}-{number}")
