"""Rules of the `launch` group: environment of the processes, processes on a machine, contents of a Slurm script.

Like those of `recipes.schema.rules`, the planner, the trainer and the launchers call them.
"""

import re
import shlex

from recipes.schema.credentials import is_secret
from recipes.schema.errors import Problem, refuse
from recipes.schema.recipe import Recipe

_ASSIGNMENT = re.compile(r"\b([A-Za-z_]\w*)=(\S+)")
"""NAME=VALUE in shell lines."""


def environment_of(environment: str) -> dict[str, str]:
    """`launch.environment` as a mapping. RecipeError for words that are not NAME=VALUE."""
    refuse(environment_problems(environment))
    return {name: value for name, _, value in (word.partition("=") for word in shlex.split(environment))}


def environment_problems(environment: str) -> list[Problem]:
    """Words of launch.environment that are not NAME=VALUE."""
    remedy = "Write it as in 'launch.environment=\"NCCL_DEBUG=INFO OMP_NUM_THREADS=4\"'."
    try:
        words = shlex.split(environment)
    except ValueError as error:
        return [Problem("launch.environment", f"launch.environment={environment!r}: {error}.", remedy)]
    wrong = [word for word in words if not word.partition("=")[1] or not word.partition("=")[0].isidentifier()]
    found = [
        Problem("launch.environment", f"launch.environment={environment!r}: {word!r} is not NAME=VALUE.", remedy)
        for word in wrong
    ]
    secret = [name for name, _, value in (word.partition("=") for word in words) if is_secret(name, value)]
    if secret:
        text = f"launch.environment gives a secret ({', '.join(secret)}), which would be stored in job scripts and checkpoints."
        remedy = f"Remove it and export it in the shell you launch from: export {secret[0]}=..."
        found = [Problem("launch.environment", text, remedy)]
    return found


def local_problems(recipe: Recipe, *, processes: int, gpus: int) -> list[Problem]:
    """More processes on this machine than GPUs. gpus: 0 if the run uses none."""
    if not gpus or processes <= gpus:
        return []
    text = f"launch.processes={processes}, but this machine has {gpus} GPU{'s' * (gpus > 1)} (CUDA_VISIBLE_DEVICES counted)."
    return [Problem("launch.processes", text, f"Use {gpus}, or run.device=cpu.")]


def script_problems(recipe: Recipe) -> list[Problem]:
    """Settings that a Slurm script must not contain: a container without an image, options with an open quotation, secrets."""
    container, slurm, found = recipe.launch.container, recipe.launch.slurm, []
    if container.kind != "none" and not container.image:
        example = "stratum.sqsh" if container.kind == "pyxis" else "stratum.sif"
        text = f"launch.container.kind={container.kind}, but launch.container.image is empty."
        found.append(Problem("launch.container.image", text, f"Name an image: launch.container.image={example}."))
    try:
        shlex.split(slurm.options)
    except ValueError as error:
        text = f"launch.slurm.options={slurm.options!r}: {error}."
        found.append(Problem("launch.slurm.options", text, "Close the quotation, as in --comment='my job'."))
    # a value that the shell computes (`$TOKEN`, `$(cat file)`) is not in the script
    given = [
        (name, value)
        for name, value in _ASSIGNMENT.findall(slurm.setup)
        if not value.lstrip("\"'").startswith(("$", "`"))
    ]
    secret = [name for name, value in given if is_secret(name, value)]
    if secret:
        text = f"launch.slurm.setup gives a secret ({', '.join(secret)}), which would be stored in job scripts and checkpoints."
        remedy = f"Export it in the shell you submit from, or read it from a file: export {secret[0]}=$(cat ~/.secret)."
        found.append(Problem("launch.slurm.setup", text, remedy))
    return found


def slurm_problems(recipe: Recipe, *, processes: int) -> list[Problem]:
    """Reasons why a recipe cannot run as Slurm jobs. processes: per node."""
    launch, found = recipe.launch, script_problems(recipe)
    if launch.gpus_per_node and processes > launch.gpus_per_node:
        text = (
            f"launch.processes={processes} is more than launch.gpus_per_node={launch.gpus_per_node}, but each process "
            f"needs its own GPU."
        )
        remedy = f"Use launch.processes={launch.gpus_per_node}, or null."
        found.append(Problem("launch.processes", text, remedy))
    if launch.slurm.save_before_end_s >= 60 * launch.slurm.time_limit_minutes:
        text = (
            f"launch.slurm.save_before_end_s={launch.slurm.save_before_end_s} is not less than the time limit "
            f"(launch.slurm.time_limit_minutes={launch.slurm.time_limit_minutes}), so a job would get the signal to stop before "
            f"it starts."
        )
        remedy = "Raise the limit, or lower save_before_end_s to the time of a step and a save."
        found.append(Problem("launch.slurm.save_before_end_s", text, remedy))
    return found
