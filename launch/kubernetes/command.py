"""`stratum launch kubernetes`: check a recipe, write its JobSet manifest, submit it with kubectl.

words --compose--> recipe --the checks of `launch slurm`--> manifest.py --> runs/NAME/logs/jobset.yaml --kubectl--> JobSet
"""

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.system import disk
from launch.compose import checked_layout, compose, run_folder
from launch.facts import fp32_block_scales_of
from launch.kubernetes.manifest import jobset, manifest_text, object_name
from launch.plan.submission import check_plan
from launch.user_errors import exit_status
from recipes.schema.errors import RecipeError
from recipes.schema.facts import Machine
from recipes.schema.foreign import parse_yaml, printable, read_bounded_text
from recipes.schema.launch_rules import kubernetes_problems, processes_per_node
from recipes.schema.options import CommandParser
from recipes.schema.recipe import Recipe

_EXAMPLES = """
stratum launch kubernetes -cn smoke launch.kubernetes.image=registry/stratum:0.1 launch.kubernetes.volume_claim=runs --dry-run
stratum launch kubernetes -cn smoke launch.kubernetes.image=registry/stratum:0.1 run.storage=s3://bucket/runs \\
    data.folder=s3://bucket/data/smoke launch.kubernetes.secrets=aws-keys   one pod; its runs and data are in a bucket
"""
_NOTES = """
Needs the JobSet controller in the cluster, and kubectl here. --dry-run prints the manifest and needs neither. Pods that are
evicted save first; the run continues from its newest checkpoint (docs/kubernetes.md).
"""
_KUBECTL_S = 60.0


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum launch kubernetes`. -> exit status."""
    parser = CommandParser(
        "launch kubernetes",
        about="Submit a run to Kubernetes as a JobSet, which restarts it to the recipe's last step.",
        examples=_EXAMPLES,
        notes=_NOTES,
        recipe=True,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the manifest, submit nothing")
    parser.add_argument("--device", default="h100", metavar="KIND", help="kind of GPU the run is planned for")
    parser.add_argument("--force", action="store_true", help="submit even if the plan says that the run will fail")
    own, words = parser.parse_recipe(arguments)
    recipe = compose(words, program="launch kubernetes")
    if isinstance(recipe, int):
        return recipe
    return exit_status(
        functools.partial(_launch, recipe, words, dry_run=own.dry_run, device=own.device, force=own.force)
    )


def _launch(recipe: Recipe, words: Sequence[str], *, dry_run: bool, device: str, force: bool) -> int:
    launch, processes = recipe.launch, processes_per_node(recipe)
    machine = Machine(has_gpu=True, fp32_block_scales=fp32_block_scales_of(recipe)) if launch.gpus_per_node else None
    problems = kubernetes_problems(recipe, words=words, processes=processes)
    checked_layout(recipe, processes=processes, nodes=launch.nodes, machine=machine, more=problems, here=False)
    text = manifest_text(
        jobset(recipe, words, pod_fields=_pod_fields(launch.kubernetes.pod)),
        about=f"Run {printable(recipe.run.name)}, written by `stratum launch kubernetes`.",
    )
    if dry_run:
        sys.stdout.write(text)
        sys.stderr.write("Not submitted. Without --dry-run the manifest is given to `kubectl create`.\n")
        return 0
    if launch.gpus_per_node:
        check_plan(recipe, world=launch.nodes * processes, device=device, force=force)
    path = run_folder(recipe).logs / "jobset.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(path, text)
    namespace = f" --namespace {launch.kubernetes.namespace}" if launch.kubernetes.namespace else ""
    place = f"{object_name(recipe.run.name)}{namespace}"
    sys.stdout.write(f"{_create(path, place=place)}\n  kubectl get jobset {place}\n")
    return 0


def _create(path: Path, *, place: str) -> str:
    """Submit a manifest. `create`, not `apply`: a JobSet of this name that exists is refused. place: its name, and its namespace
    as an option of kubectl. -> kubectl's answer."""
    if shutil.which("kubectl") is None:
        raise RecipeError(f"kubectl is not installed here. The manifest is {path}: submit it where kubectl is.")
    try:
        done = subprocess.run(
            ["kubectl", "create", "-f", str(path)], capture_output=True, text=True, timeout=_KUBECTL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RecipeError(f"kubectl did not answer within {_KUBECTL_S:g} s. The manifest is {path}.") from None
    if done.returncode:
        remedy = ""
        if "AlreadyExists" in done.stderr:
            remedy = (
                f" A JobSet stays after its run has ended. If it has, remove it and submit again to continue the run: kubectl "
                f"delete jobset {place}. If it belongs to another run, choose another run.name."
            )
        raise RecipeError(f"kubectl refuses {path}: {printable(done.stderr.strip(), most=1000)}.{remedy}")
    return done.stdout.strip()


def _pod_fields(place: str | None) -> dict[str, Any]:
    """The fields of launch.kubernetes.pod. RecipeError if the file cannot be read or replaces what the launcher writes."""
    if place is None:
        return {}
    try:
        found = parse_yaml(read_bounded_text(Path(place)))
    except (OSError, ValueError) as error:
        raise RecipeError(f"launch.kubernetes.pod={place}: {getattr(error, 'strerror', None) or error}.") from error
    if not isinstance(found, dict):
        raise RecipeError(f"launch.kubernetes.pod={place} does not contain fields of a pod's spec.")
    if own := sorted({"containers", "volumes", "restartPolicy", "terminationGracePeriodSeconds"} & found.keys()):
        raise RecipeError(f"launch.kubernetes.pod={place} sets {', '.join(own)}, which this command writes. Remove it.")
    return found
