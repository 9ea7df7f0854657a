"""Rules of the `launch` group: environment of the processes, processes on a machine, contents of a Slurm script.

Like those of `recipes.schema.rules`, the planner, the trainer and the launchers call them.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from recipes.schema.credentials import is_secret, without_credentials
from recipes.schema.data import is_remote
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


def processes_per_node(recipe: Recipe) -> int:
    """Processes of a node of a cluster: launch.processes, or one for each GPU, or the degrees divided by the nodes."""
    launch, parallel = recipe.launch, recipe.parallel
    degrees = parallel.tensor * parallel.pipeline * parallel.context
    return launch.processes or launch.gpus_per_node or -(-degrees // launch.nodes)


def kubernetes_problems(recipe: Recipe, *, words: Sequence[str], processes: int) -> list[Problem]:
    """Reasons why a recipe cannot run on Kubernetes. words: of the command line. processes: per node."""
    launch, kubernetes, found = recipe.launch, recipe.launch.kubernetes, gpu_problems(recipe, processes=processes)
    if not kubernetes.image.strip():
        remedy = "Name an image with this project: launch.kubernetes.image=registry/stratum:0.1."
        found.append(Problem("launch.kubernetes.image", "launch.kubernetes.image is empty.", remedy))
    if kubernetes.volume_claim is None and launch.nodes > 1:
        text = f"launch.nodes={launch.nodes} pods write one run folder, but launch.kubernetes.volume_claim=null."
        found.append(Problem("launch.kubernetes.volume_claim", text, "Name a claim that is ReadWriteMany."))
    elif kubernetes.volume_claim is None and recipe.run.storage is None:
        text = "The run would be lost with its pod: launch.kubernetes.volume_claim=null and run.storage=null."
        found.append(Problem("launch.kubernetes.volume_claim", text, "Set one of them."))
    folder = recipe.data.folder
    is_below = PurePosixPath(kubernetes.folder, folder).is_relative_to(kubernetes.folder) and not is_remote(folder)
    if kubernetes.volume_claim is None and is_below and recipe.objective.kind != "grpo":  # which reads prompts instead
        text = (
            f"data.folder={folder} is empty in the pod: launch.kubernetes.volume_claim=null mounts an empty volume at "
            f"{kubernetes.folder}."
        )
        remedy = "Name a claim that has the prepared data, a folder of the image outside of it, or s3://BUCKET/FOLDER."
        found.append(Problem("launch.kubernetes.volume_claim", text, remedy))
    if not re.fullmatch(r"(/[\w.-]+)+", kubernetes.folder):
        text = f"launch.kubernetes.folder={kubernetes.folder!r} is not an absolute folder."
        found.append(Problem("launch.kubernetes.folder", text, "Write it as in /work."))
    for key in ("node_selector", "tolerations"):
        pattern = r"[\w./-]+=[\w.-]*" if key == "node_selector" else r"[\w./-]+(=[\w.-]*)?:[A-Za-z]+"
        form = "NAME=VALUE" if key == "node_selector" else "NAME[=VALUE]:EFFECT"
        wrong = [word for word in getattr(kubernetes, key).split() if not re.fullmatch(pattern, word)]
        if wrong:
            text = f"launch.kubernetes.{key}={getattr(kubernetes, key)!r}: {wrong[0]!r} is not {form}."
            found.append(Problem(f"launch.kubernetes.{key}", text, f"Write words like {form}, separated by blanks."))
    for key in ("namespace", "volume_claim", "service_account", "priority_class", "queue"):
        if (name := getattr(kubernetes, key)) is not None:
            found += _object_name_problems(key, name)
    for name in kubernetes.secrets.split():
        found += _object_name_problems("secrets", name)
    if any(without_credentials(word) != word for word in words):
        remedy = "Put it into a Secret (launch.kubernetes.secrets) and read it from the environment."
        found.append(Problem("launch.kubernetes", "A word of the command contains a password or a token.", remedy))
    for word in words:
        if word.split("=")[0] in ("--config-dir", "-cd"):
            text = "--config-dir names a folder of this machine, which pods do not have."
            remedy = f"Put your recipes into the image, below {RECIPES_IN_IMAGE}, and name them with -cn."
            found.append(Problem("launch.kubernetes", text, remedy))
    return found


RECIPES_IN_IMAGE = "recipes/"
"""Folder of the installed package in which -cn finds recipes."""
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
"""Names of Kubernetes' objects (RFC 1123 subdomains)."""


def _object_name_problems(key: str, name: str) -> list[Problem]:
    if _OBJECT.fullmatch(name):
        return []
    text = f"launch.kubernetes.{key}: {name!r} is not a name in Kubernetes."
    return [Problem(f"launch.kubernetes.{key}", text, "Use lower-case letters, digits, `-` and `.`.")]


def gpu_problems(recipe: Recipe, *, processes: int) -> list[Problem]:
    """More processes on a node than GPUs requested there."""
    gpus = recipe.launch.gpus_per_node
    if not gpus or processes <= gpus:
        return []
    text = f"launch.processes={processes} is more than launch.gpus_per_node={gpus}, but each process needs its own GPU."
    return [Problem("launch.processes", text, f"Use launch.processes={gpus}, or null.")]


def slurm_problems(recipe: Recipe, *, processes: int) -> list[Problem]:
    """Reasons why a recipe cannot run as Slurm jobs. processes: per node."""
    launch, found = recipe.launch, [*script_problems(recipe), *gpu_problems(recipe, processes=processes)]
    if launch.slurm.save_before_end_s >= 60 * launch.slurm.time_limit_minutes:
        text = (
            f"launch.slurm.save_before_end_s={launch.slurm.save_before_end_s} is not less than the time limit "
            f"(launch.slurm.time_limit_minutes={launch.slurm.time_limit_minutes}), so a job would get the signal to stop before "
            f"it starts."
        )
        remedy = "Raise the limit, or lower save_before_end_s to the time of a step and a save."
        found.append(Problem("launch.slurm.save_before_end_s", text, remedy))
    if launch.slurm.spare_nodes and launch.slurm.continuation == "requeue":
        text = (
            f"launch.slurm.spare_nodes={launch.slurm.spare_nodes} and launch.slurm.continuation=requeue: Slurm does not requeue "
            f"a job with spares whose first node is lost, so the run would end as FAILED."
        )
        remedy = "Use launch.slurm.continuation=chain (the next job continues), or launch.slurm.spare_nodes=0."
        found.append(Problem("launch.slurm.continuation", text, remedy))
    return found
