"""`stratum launch slurm`: check a recipe, write its job script, submit it.

    words --compose--> recipe --checks--> Job --job_script.py--> runs/NAME/logs/job.sh --sbatch--> job number in logs/jobs

What happens then is in the script and in `launch.slurm.after_job`; `stratum status` and `stratum cancel` look at it and end it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.children import checkout
from launch.compose import checked_layout, compose, run_folder
from launch.facts import fp32_block_scales_of
from launch.runs import RunFolder
from launch.slurm.after_job import start_afresh
from launch.slurm.job_script import Job, Preparation, preparation_script, training_script
from launch.slurm.job_times import advice
from launch.slurm.queue import QueuedJob, SlurmError, look_up, submit
from recipes.schema.errors import USER_ERRORS, RecipeError, refuse
from recipes.schema.facts import Machine
from recipes.schema.options import CommandParser
from recipes.schema.recipe import Recipe
from recipes.schema.rules import container_problems, environment_of, slurm_problems

_EXAMPLES = """
stratum launch slurm -cn smoke --dry-run                                show the script; needs no Slurm
stratum launch slurm -cn smoke run.name=two launch.nodes=2              two nodes
stratum launch slurm -cn smoke run.name=big launch=slurm_gpu launch.nodes=16 launch.slurm.partition=h100
stratum launch slurm -cn smoke launch=slurm_pyxis launch.container.image=stratum.sqsh
stratum launch slurm -cn smoke --prepare --tasks 64                     an array job that prepares the recipe's data
"""
_NOTES = """
The run continues over as many jobs as its last step needs (launch.slurm.continuation): before a job's time limit, and when
it is preempted, the processes save and stop. Everything a job says is in runs/NAME/logs/. `stratum status NAME` shows how far
it is, `stratum cancel NAME` ends it; `stratum fields launch` lists the fields.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum launch slurm`. -> exit status."""
    parser = CommandParser(
        "launch slurm",
        about="Submit a run to Slurm; it continues, job after job, to the recipe's last step.",
        examples=_EXAMPLES,
        notes=_NOTES,
        recipe=True,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("--prepare", action="store_true", help="prepare the recipe's data instead of training")
    parser.add_argument("--tasks", type=int, default=8, metavar="N", help="with --prepare: tasks that share the work")
    parser.add_argument(
        "--device",
        default="h100",
        metavar="KIND",
        help="with --dry-run: GPUs that its advice on time limits is for",
    )
    own, words = parser.parse_recipe(arguments)
    recipe = compose(words, program="launch slurm")
    if isinstance(recipe, int):
        return recipe
    try:
        if own.prepare:
            return _prepare(recipe, words, tasks=own.tasks, dry_run=own.dry_run)
        return _train(recipe, words, dry_run=own.dry_run, device=own.device)
    except USER_ERRORS as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def active_jobs(run: RunFolder) -> list[QueuedJob]:
    """Jobs of a run that wait or run."""
    return [job for job in look_up(job_numbers(run)[-8:]) if job.is_active]


def job_numbers(run: RunFolder) -> list[int]:
    """Every job this run was given, oldest first."""
    try:
        return [int(word) for word in (run.logs / "jobs").read_text().split()]
    except OSError:
        return []


def _train(recipe: Recipe, words: list[str], *, dry_run: bool, device: str) -> int:
    job = training_job(recipe, words)
    script = training_script(job)
    run = run_folder(recipe)
    if dry_run:
        said = advice(recipe, run, world=job.nodes * job.processes, device=device)
        sys.stdout.write(script)
        sys.stderr.write(
            f"Not submitted. Without --dry-run it is written to {run.logs}/job.sh and handed to sbatch.\n{said}"
        )
        return 0
    if run.checkpoint_step() >= recipe.run.steps:
        sys.stderr.write(f"{run.path} is at its last step ({recipe.run.steps}) already; nothing to submit.\n")
        return 0
    if run.longest_stop_s() > recipe.launch.slurm.save_before_end_s:
        sys.stderr.write(
            f"warning: a step and a save of this run took {run.longest_stop_s():.0f} s, longer than launch.slurm."
            f"save_before_end_s={recipe.launch.slurm.save_before_end_s}: what a job trains last would be lost. Raise it.\n"
        )
    number = submit_run(run, script)
    processes = f"{job.nodes} node{'s' * (job.nodes > 1)} x {job.processes}"
    sys.stdout.write(
        f"Submitted job {number} ({processes} processes) for {run.path}, to step {recipe.run.steps}.\n"
        f"  stratum status {run.path}\n"
        f"  stratum cancel {run.path}\n"
    )
    return 0


def submit_run(run: RunFolder, script: str) -> int:
    """Write a run's script and submit it, earlier failures forgotten. -> job number. SlurmError where it has a job already."""
    _refuse_second(run)
    run.logs.mkdir(parents=True, exist_ok=True)
    start_afresh(run)
    path = run.logs / "job.sh"
    path.write_text(script)
    number = submit(path)
    with (run.logs / "jobs").open("a") as stream:
        stream.write(f"{number}\n")
    return number


def training_job(recipe: Recipe, words: Sequence[str]) -> Job:
    """The job of a recipe, checked. RecipeError names what cannot work."""
    launch = recipe.launch
    degrees = recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context
    processes = launch.processes or launch.gpus_per_node or -(-degrees // launch.nodes)
    machine = Machine(has_gpu=True, fp32_block_scales=fp32_block_scales_of(recipe)) if launch.gpus_per_node else None
    more = slurm_problems(recipe, processes=processes)
    checked_layout(recipe, processes=processes, nodes=launch.nodes, machine=machine, more=more, here=False)
    environment = {"PYTHONUNBUFFERED": "1"}
    threads = launch.slurm.cpus_per_process or recipe.run.threads
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if launch.gpus_per_node and (recipe.parallel.tensor > 1 or recipe.parallel.context > 1):
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return Job(
        name=recipe.run.name,
        folder=str(run_folder(recipe).path),
        directory=os.getcwd(),
        words=words,
        python=sys.executable,
        checkout=checkout(),
        nodes=launch.nodes,
        processes=processes,
        gpus_per_node=launch.gpus_per_node,
        steps=recipe.run.steps,
        restarts=launch.restarts,
        environment={**environment, **environment_of(recipe.launch.environment)},
        slurm=launch.slurm,
        container=launch.container,
    )


def _prepare(recipe: Recipe, words: list[str], *, tasks: int, dry_run: bool) -> int:
    refuse(container_problems(recipe))
    if tasks < 1:
        raise RecipeError(f"--tasks={tasks}: use 1 or more")
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
    )
    script = preparation_script(job)
    path = folder / "logs" / "prepare.sh"
    if dry_run:
        sys.stdout.write(script)
        sys.stderr.write(f"Not submitted. Without --dry-run it is written to {path} and handed to sbatch.\n")
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    number = submit(path)
    sys.stdout.write(
        f"Submitted array job {number} ({tasks} tasks) for {folder}; logs: {path.parent}/{number}_TASK.log\n"
    )
    return 0


def _refuse_second(run: RunFolder) -> None:
    """Two jobs writing into one run would spoil it."""
    active = active_jobs(run)
    if active:
        raise SlurmError(
            f"job {active[0].number} of {run.path} is {active[0].state.lower()} already. Look at it with `stratum "
            f"status {run.path}`, end it with `stratum cancel {run.path}`, or choose another run.name."
        )
