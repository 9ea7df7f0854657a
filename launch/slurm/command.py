"""`stratum launch slurm`: check a recipe, write its job script, submit it.

    words --compose--> recipe --checks--> Job --job_script.py--> runs/NAME/logs/job.sh --sbatch--> job number in logs/jobs

The script and `launch.slurm.after_job` decide what follows each job. `stratum status` shows the run, `stratum cancel` ends it.
"""

import argparse
import functools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.children import checkout, rank_environment
from launch.compose import checked_layout, compose, run_folder
from launch.facts import fp32_block_scales_of
from launch.lease import LeaseError, current_owner, refusal, take
from launch.plan.submission import check_plan
from launch.queue import SlurmError, submit
from launch.runs import RunFolder
from launch.slurm.after_job import reset_state
from launch.slurm.host import parse_host, submit_from
from launch.slurm.job_script import (
    CREDENTIALS,
    Job,
    Preparation,
    credentials_text,
    preparation_script,
    training_script,
    without_gpus,
)
from launch.slurm.job_times import advice
from launch.slurm.jobs import active_jobs
from launch.slurm.left_out import left_out, suspected
from launch.slurm.snapshot import config_folders, take_snapshot
from launch.starts import note_submission
from launch.user_errors import exit_status
from recipes.schema.data import is_remote
from recipes.schema.errors import RecipeError, refuse
from recipes.schema.facts import Machine
from recipes.schema.launch_rules import environment_of, processes_per_node, script_problems, slurm_problems
from recipes.schema.options import CommandParser
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import SUSPECTS

_EXAMPLES = """
stratum launch slurm -cn smoke --dry-run                                print the script; needs no Slurm
stratum launch slurm -cn smoke run.name=two launch.nodes=2 run.microbatch_rows=4      two nodes
stratum launch slurm -cn nemotron_nano_12b_v2 launch=slurm_gpu launch.nodes=92 parallel.pipeline=2 launch.slurm.partition=h100
stratum launch slurm -cn smoke run.name=boxed run.microbatch_rows=1 launch=slurm_pyxis launch.container.image=stratum.sqsh
stratum launch slurm -cn smoke --prepare --tasks 64                     an array job that prepares the recipe's data
stratum launch slurm -cn smoke launch=slurm_gpu --host me@login:/scratch/me/stratum    over ssh, with the code of this machine
"""
_NOTES = """
The run continues over several jobs until its last step (launch.slurm.continuation): before a job's time limit, and when a job
is preempted, the processes save and stop. All output of the jobs is in runs/NAME/logs/. `stratum status NAME` shows the
progress, `stratum cancel NAME` ends the run, `stratum fields launch` lists the fields.
--host: the command runs on the login node in FOLDER (default: stratum in your home folder), which needs an environment (`make
setup`); relative paths, data and runs are there. ssh uses its own configuration; passwords do not pass through stratum.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum launch slurm`. -> exit status."""
    parser = CommandParser(
        "launch slurm",
        about="Submit a run to Slurm. It continues, job after job, to the recipe's last step.",
        examples=_EXAMPLES,
        notes=_NOTES,
        recipe=True,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("--prepare", action="store_true", help="prepare the recipe's data instead of training")
    parser.add_argument("--tasks", type=int, default=8, metavar="N", help="with --prepare: tasks that share the work")
    parser.add_argument("--device", default="h100", metavar="KIND", help="kind of GPU the run is planned for")
    parser.add_argument("--force", action="store_true", help="submit even if the plan says that the run will fail")
    parser.add_argument("--host", metavar="[USER@]HOST[:FOLDER]", help="submit from this login node, over ssh")
    own, words = parser.parse_recipe(arguments)
    recipe = compose(words, program="launch slurm")  # mistakes in the recipe are found before anything connects
    if isinstance(recipe, int):
        return recipe
    if own.host is not None:
        return exit_status(functools.partial(_submit_from_host, own, words, recipe))
    if own.prepare:
        return exit_status(functools.partial(_prepare, recipe, words, tasks=own.tasks, dry_run=own.dry_run))
    return exit_status(
        functools.partial(_train, recipe, words, dry_run=own.dry_run, device=own.device, force=own.force)
    )


def _submit_from_host(own: argparse.Namespace, words: list[str], recipe: Recipe) -> int:
    flags = [f"--{name.replace('_', '-')}" for name in ("dry_run", "prepare", "force") if getattr(own, name)]
    options = [*words, *flags, f"--tasks={own.tasks}", f"--device={own.device}"]
    run = None if own.dry_run or own.prepare else run_folder(recipe).path
    return submit_from(parse_host(own.host), options, run=run)


def _train(recipe: Recipe, words: list[str], *, dry_run: bool, device: str, force: bool) -> int:
    job = training_job(recipe, words)
    run = run_folder(recipe)
    if dry_run:
        sys.stdout.write(training_script(job))
        sys.stderr.write(
            f"Not submitted. Without --dry-run the script is written to {run.logs}/job.sh and submitted, with a copy of the "
            f"code in {run.logs}/code.\n{advice(recipe, run, world=job.nodes * job.processes, device=device)}"
        )
        return 0
    if run.checkpoint_step() >= recipe.run.steps:
        sys.stderr.write(f"{run.path} has reached its last step ({recipe.run.steps}); there is nothing to submit.\n")
        return 0
    if requests_gpus(recipe):
        check_plan(recipe, world=job.nodes * job.processes, device=device, force=force)
    if run.longest_stop_s() > recipe.launch.slurm.save_before_end_s:
        sys.stderr.write(
            f"warning: a step and a save of this run took {run.longest_stop_s():.0f} s, longer than launch.slurm."
            f"save_before_end_s={recipe.launch.slurm.save_before_end_s}: the last steps of each job would be lost. Raise it.\n"
        )
    number = submit_run(run, job, keep_code=True)
    spares = f" and {job.spare_nodes} spare" if job.spare_nodes else ""
    processes = f"{job.nodes} node{'s' * (job.nodes > 1)}{spares} x {job.processes}"
    sys.stdout.write(
        f"Submitted job {number} ({processes} processes) for {run.path}, to step {recipe.run.steps}.\n"
        f"  stratum status {run.path}\n"
        f"  stratum cancel {run.path}\n"
    )
    return 0


def requests_gpus(recipe: Recipe) -> bool:
    """Whether a job of the recipe requests GPUs, by launch.gpus_per_node or by the user's own sbatch options."""
    return recipe.launch.gpus_per_node > 0 or "gpu" in recipe.launch.slurm.options


def submit_run(run: RunFolder, job: Job, *, keep_code: bool) -> int:
    """Write a run's script and submit it. Resets the count of earlier failures. -> job number.

    keep_code: copy the packages first, and run the copy. Raises SlurmError if the run already has a job, LeaseError if a
    trainer owns it or another submission of it is in progress, RecipeError for values that Slurm cannot represent.
    """
    training_script(job)  # raises before anything is written
    found = current_owner(run.path)
    if found is not None and found[1] == "alive":
        raise LeaseError(refusal(found[0], what=str(run.path)))
    run.logs.mkdir(parents=True, exist_ok=True)
    lease = take(run.logs / "submitting", what=f"the submission of {run.path}")
    try:
        _refuse_second_job(run)
        reset_state(run, options=job.slurm.options)
        if suspects := suspected(run.path):
            sys.stderr.write(
                f"Left out: {', '.join(suspects)} ({run.path / SUSPECTS} names them; remove their lines to use them again).\n"
            )
        excluded = [f"--exclude={','.join(left_out(run.logs))}"] if left_out(run.logs) else []
        if keep_code:
            code = take_snapshot(run.logs, job.words, with_environment=job.container.kind == "none")
            job = replace(job, words=code.words, code=str(code.folder))
        number = submit(_write_script(run.logs / "job.sh", training_script(job), job.words), options=excluded)
        note_submission(run.logs)
        with (run.logs / "jobs").open("a") as stream:
            stream.write(f"{number}\n")
        return number
    finally:
        lease.release()


def training_job(recipe: Recipe, words: Sequence[str]) -> Job:
    """The job of a recipe, checked. Raises RecipeError with all problems."""
    launch = recipe.launch
    processes = processes_per_node(recipe)
    machine = Machine(has_gpu=True, fp32_block_scales=fp32_block_scales_of(recipe)) if launch.gpus_per_node else None
    more = slurm_problems(recipe, processes=processes)
    checked_layout(recipe, processes=processes, nodes=launch.nodes, machine=machine, more=more, here=False)
    environment = rank_environment(recipe, threads=launch.slurm.cpus_per_process or recipe.run.threads)
    return Job(
        name=recipe.run.name,
        folder=str(run_folder(recipe).path),
        directory=os.getcwd(),
        words=words,
        python=sys.executable,
        checkout=checkout(),
        nodes=launch.nodes,
        spare_nodes=launch.slurm.spare_nodes,
        timeout_s=launch.timeout_s,
        processes=processes,
        gpus_per_node=launch.gpus_per_node,
        steps=recipe.run.steps,
        restarts=launch.restarts,
        environment={**environment, **environment_of(recipe.launch.environment)},
        slurm=launch.slurm,
        container=launch.container,
        mounts=outside_folders(
            run_folder(recipe).path,
            recipe.data.folder,
            recipe.data.cache.folder,
            recipe.data.tokenizer.path,
            recipe.run.start_from,
            recipe.objective.teacher,
            recipe.objective.teacher_cache,
            *config_folders(words),
        ),
    )


def outside_folders(*paths: str | Path | None) -> list[str]:
    """Folders outside the working directory that a container must mount so that these paths exist in it, links included.

    For a path that does not exist yet, the nearest existing folder above it. Remote paths are left out.
    """
    here = Path.cwd().resolve()
    found: list[str] = []
    for path in paths:
        if path is None or "://" in str(path) or str(path).startswith("hf:"):
            continue
        for folder in (Path(os.path.abspath(path)), Path(path).resolve()):  # the path itself, and what links lead to
            while not folder.is_dir() and folder != folder.parent:
                folder = folder.parent
            if folder != folder.parent and not folder.is_relative_to(here) and str(folder) not in found:
                found.append(str(folder))
    return [one for one in found if not any(Path(one).is_relative_to(two) for two in found if two != one)]


def _prepare(recipe: Recipe, words: list[str], *, tasks: int, dry_run: bool) -> int:
    refuse(script_problems(recipe))
    if tasks < 1:
        raise RecipeError(f"--tasks={tasks}: use 1 or more")
    if is_remote(recipe.data.folder):
        raise RecipeError(f"data.folder={recipe.data.folder} is an address; data is prepared into a folder. Name one.")
    folder = Path(recipe.data.folder)
    job = Preparation(
        name=f"prepare-{folder.name}",
        folder=str(folder),
        directory=os.getcwd(),
        words=words,
        python=sys.executable,
        checkout=checkout(),
        tasks=tasks,
        cpus=recipe.data.workers,
        slurm=recipe.launch.slurm,
        container=recipe.launch.container,
        mounts=outside_folders(
            folder,
            recipe.data.cache.folder,
            recipe.data.tokenizer.path,
            *(_before_glob(source.path) for source in recipe.data.sources.values()),
            *config_folders(words),
        ),
    )
    script = preparation_script(job)
    given, kept = shlex.split(recipe.launch.slurm.options), without_gpus(recipe.launch.slurm.options)
    if given != kept:
        left_out = " ".join(word for word in given if word not in kept)
        sys.stderr.write(f"Preparing data needs no GPU: {left_out} of launch.slurm.options is left out.\n")
    path = folder / "logs" / "prepare.sh"
    if dry_run:
        sys.stdout.write(script)
        sys.stderr.write(f"Not submitted. Without --dry-run the script is written to {path} and submitted.\n")
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    code = take_snapshot(path.parent, words, with_environment=False)
    script = preparation_script(replace(job, words=code.words, code=str(code.folder)))
    number = submit(_write_script(path, script, code.words))
    sys.stdout.write(
        f"Submitted array job {number} ({tasks} tasks) for {folder}; logs: {path.parent}/{number}_TASK.log\n"
    )
    return 0


def _write_script(path: Path, text: str, words: Sequence[str]) -> Path:
    """Write a job script, and next to it a file with the words that contain credentials, readable by this user only. -> `path`"""
    secret = path.parent / CREDENTIALS
    secret.unlink(missing_ok=True)
    if credentials := credentials_text(words):
        with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(credentials)
    path.write_text(text)
    return path


def _before_glob(path: str) -> str:
    """The part of a source's path before the first wildcard, as a folder."""
    fixed = re.split(r"[*?\[{]", path, maxsplit=1)[0]
    return path if fixed == path else fixed.rpartition("/")[0] or "."


def _refuse_second_job(run: RunFolder) -> None:
    """Raise SlurmError if a job of the run waits or runs: two jobs would write into one run."""
    active = active_jobs(run)
    if active:
        raise SlurmError(
            f"job {active[0].number} of {run.path} is already {active[0].state.lower()}. See `stratum status "
            f"{run.path}`, end it with `stratum cancel {run.path}`, or choose another run.name."
        )
