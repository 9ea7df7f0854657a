"""`stratum launch local`: a run of 1..N processes on this machine, seen to its end.

    words --compose--> recipe --checks--> attempt (launch.local.supervise) --failed--> wait --> attempt --> ... --> exit status

Every attempt resumes from the newest checkpoint. The exit status is the trainer's own (docs/launch.md), or that of the
rank that failed first.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.system.retry import wait_s
from launch.children import python_module
from launch.compose import checked_layout, compose, run_folder
from launch.facts import fp32_block_scales_of
from launch.lease import LeaseError, current_owner, refusal
from launch.local.continuation import decide
from launch.local.failures import tell
from launch.local.supervise import StopRequest, run_attempt, say
from launch.runs import RunFolder
from recipes.schema import units
from recipes.schema.errors import USER_ERRORS, RecipeError
from recipes.schema.facts import Machine, missing_packages
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser
from recipes.schema.recipe import Recipe
from recipes.schema.rules import environment_of, local_problems

_MOST_WAIT_S = 300.0
"""Before a restart."""
_EXAMPLES = """
stratum launch local -cn smoke                                          as many processes as the recipe needs
stratum launch local -cn smoke run.name=two parallel.tensor=2           two processes
stratum launch local -cn smoke run.name=four --nproc 4 parallel.tensor=2 parallel.pipeline=2
stratum launch local -cn smoke --show all run.name=pair --nproc 2       everybody's output, each line with its rank
"""
_NOTES = """
Ctrl-C (or SIGTERM, SIGUSR1): all processes finish their step, save and stop; the same command continues. A second one
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
    try:
        gpus = 0 if recipe.run.device == "cpu" else _gpus()
        processes = recipe.launch.processes or gpus or _degrees(recipe)
        machine = Machine(has_gpu=gpus > 0, missing=missing_packages(), fp32_block_scales=fp32_block_scales_of(recipe))
        more = local_problems(recipe, processes=processes, gpus=gpus)
        layout = checked_layout(recipe, processes=processes, machine=machine, more=more, here=True)
        environment = _environment(recipe, processes)
        shown = _shown(own.show, processes)
        run = run_folder(recipe)
        refuse_second(run)
    except USER_ERRORS as error:
        return complain(error)
    say(f"{processes} process{'es' * (processes > 1)} ({layout.describe()}), logs in {run.logs}")
    return run_to_end(
        python_module("launch.local.rank", "train", *words),
        recipe=recipe,
        run=run,
        processes=processes,
        environment=environment,
        shown=shown,
    )


def run_to_end(
    command: list[str],
    *,
    recipe: Recipe,
    run: RunFolder,
    processes: int,
    environment: dict[str, str],
    shown: frozenset[int],
) -> int:
    """Attempts until the run is finished, stopped, or not worth another one. -> exit status."""
    failures = 0
    use_terminal = len(shown) == 1 and recipe.telemetry.progress and sys.stdout.isatty() and sys.stderr.isatty()
    with StopRequest() as stop:
        while True:
            before = run.newest_checkpoint()
            logs = _new_folder(run.logs)
            end = run_attempt(
                command,
                processes=processes,
                environment=environment,
                logs=logs,
                shown=shown,
                grace_s=recipe.launch.grace_s,
                stop=stop,
                use_terminal=use_terminal,
            )
            if end.failures:
                say(tell(logs, end.failures, seen_live=shown))
            if end.status == 0 or stop.received:
                return end.status
            decision = decide(
                end.status,
                at_last_step=run.checkpoint_step() >= recipe.run.steps,
                has_new_checkpoint=run.newest_checkpoint() not in (None, before),
                failures=failures,
                restarts=recipe.launch.restarts,
                in_queue=False,
            )
            failures = decision.failures
            if decision.action != "again":
                say(f"not started again: {decision.reason}")
                return end.status
            delay = wait_s(failures, first_s=recipe.launch.backoff_s, most_s=_MOST_WAIT_S)
            from_where = run.newest_checkpoint() or "the beginning"
            when = f"in {delay:g} s (Ctrl-C: not)" if delay else "at once"
            say(f"{decision.reason}; starting again from {from_where} {when}")
            if stop.wait(delay):
                return end.status


def refuse_second(run: RunFolder) -> None:
    """Refuse to start a run that a trainer works on. LeaseError names it.

    The trainer itself refuses too (train.resilience.lease); here it costs no start of processes.
    """
    found = current_owner(run.path)
    if found is not None and found[1] == "alive":
        raise LeaseError(refusal(found[0], what=str(run.path)))


def _degrees(recipe: Recipe) -> int:
    return recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context


def _gpus() -> int:
    """GPUs that processes of this machine can see; asks the driver's files, not CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def _environment(recipe: Recipe, processes: int) -> dict[str, str]:
    """What every process gets beside its rank. What the caller has set already stays."""
    threads = recipe.run.threads or max(1, len(os.sched_getaffinity(0)) // processes)
    defaults = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # gloo else goes by the host name, which need not lead back here
    if recipe.parallel.tensor > 1 or recipe.parallel.context > 1:
        defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron overlaps GEMMs and communication by launch order
    return {**defaults, **os.environ, **environment_of(recipe.launch.environment)}


def _shown(text: str, processes: int) -> frozenset[int]:
    if text == "all":
        return frozenset(range(processes))
    try:
        ranks = frozenset(int(word) for word in text.split(","))
    except ValueError:
        raise RecipeError(f"--show={text}: give ranks as in 0,3, or all") from None
    beyond = sorted(rank for rank in ranks if not 0 <= rank < processes)
    if beyond:
        raise RecipeError(f"--show={text}: there is no rank {beyond[0]} among {processes} processes")
    return ranks


def _new_folder(logs: Path) -> Path:
    """A name for this attempt's logs that no attempt has had."""
    stem, number = f"local-{units.stamp()}", 1
    while (logs / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return logs / (stem if number == 1 else f"{stem}-{number}")
