"""`stratum launch kubernetes`: check a recipe, write its manifests, submit them with kubectl.

words --compose--> recipe --the checks of `launch slurm`--> manifest.py --> runs/NAME/logs/jobset.yaml --kubectl--> JobSet
                                          --kind trainjob --> trainingruntime.yaml, trainjob.yaml --> TrainJob --> JobSet
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
from launch.kubernetes.manifest import jobset, manifest_text, object_name, trainjob
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
stratum launch kubernetes -cn smoke launch.kubernetes.image=registry/stratum:0.1 launch.kubernetes.volume_claim=runs --dry-run \\
    --kind trainjob                               for Kubeflow Trainer
stratum launch kubernetes -cn smoke launch.kubernetes.image=registry/stratum:0.1 run.storage=s3://bucket/runs \\
    data.folder=s3://bucket/data/smoke launch.kubernetes.secrets=aws-keys   one pod; its runs and data are in a bucket
"""
_NOTES = """
Needs kubectl here and the JobSet controller in the cluster (--kind trainjob: Kubeflow Trainer 2). --dry-run needs neither. Pods
that are evicted save first; the run continues from its newest checkpoint (docs/kubernetes.md).
"""
_KUBECTL_S = 60.0
_KINDS = ("jobset", "trainjob")


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum launch kubernetes`. -> exit status."""
    parser = CommandParser(
        "launch kubernetes",
        about="Submit a run to Kubernetes as a JobSet or a TrainJob, which restarts it to the recipe's last step.",
        examples=_EXAMPLES,
        notes=_NOTES,
        recipe=True,
    )
    parser.add_argument("--kind", choices=_KINDS, default=_KINDS[0], help="object to submit (default: jobset)")
    parser.add_argument("--dry-run", action="store_true", help="print the manifests, submit nothing")
    parser.add_argument("--device", default="h100", metavar="KIND", help="kind of GPU the run is planned for")
    parser.add_argument("--force", action="store_true", help="submit even if the plan says that the run will fail")
    own, words = parser.parse_recipe(arguments)
    recipe = compose(words, program="launch kubernetes")
    if isinstance(recipe, int):
        return recipe
    return exit_status(
        functools.partial(
            _launch, recipe, words, kind=own.kind, dry_run=own.dry_run, device=own.device, force=own.force
        )
    )


def _launch(recipe: Recipe, words: Sequence[str], *, kind: str, dry_run: bool, device: str, force: bool) -> int:
    launch, processes = recipe.launch, processes_per_node(recipe)
    machine = Machine(has_gpu=True, fp32_block_scales=fp32_block_scales_of(recipe)) if launch.gpus_per_node else None
    problems = kubernetes_problems(recipe, words=words, processes=processes)
    checked_layout(recipe, processes=processes, nodes=launch.nodes, machine=machine, more=problems, here=False)
    pod_fields = _pod_fields(launch.kubernetes.pod)
    manifests = (
        (jobset(recipe, words, pod_fields=pod_fields),)
        if kind == "jobset"
        else trainjob(recipe, words, pod_fields=pod_fields)
    )
    about = f"Run {printable(recipe.run.name)}, written by `stratum launch kubernetes`."
    if dry_run:
        sys.stdout.write(manifest_text(*manifests, about=about))
        sys.stderr.write(f"Not submitted. Without --dry-run kubectl creates the {manifests[-1]['kind']}.\n")
        return 0
    if launch.gpus_per_node:
        check_plan(recipe, world=launch.nodes * processes, device=device, force=force)
    namespace = f" --namespace {launch.kubernetes.namespace}" if launch.kubernetes.namespace else ""
    place = f"{object_name(recipe.run.name)}{namespace}"
    for manifest in manifests:
        path = run_folder(recipe).logs / f"{manifest['kind'].lower()}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, manifest_text(manifest, about=about))
        # A TrainingRuntime that exists has the same content, by its name. A job that exists is refused.
        verb = "apply" if manifest["kind"] == "TrainingRuntime" else "create"
        sys.stdout.write(f"{_submit(verb, path, kind=kind, place=place)}\n")
    sys.stdout.write(f"  kubectl get {kind} {place}\n")
    return 0


def _submit(verb: str, path: Path, *, kind: str, place: str) -> str:
    """Give a manifest to kubectl. place: the job's name, and its namespace as an option of kubectl. -> kubectl's answer."""
    if shutil.which("kubectl") is None:
        raise RecipeError(f"kubectl is not installed here. The manifest is {path}: submit it where kubectl is.")
    try:
        done = subprocess.run(
            ["kubectl", verb, "-f", str(path)], capture_output=True, text=True, timeout=_KUBECTL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RecipeError(f"kubectl did not answer within {_KUBECTL_S:g} s. The manifest is {path}.") from None
    if done.returncode:
        remedy = ""
        if "AlreadyExists" in done.stderr:
            remedy = (
                f" A {kind} stays after its run has ended. If it has, remove it and submit again to continue the run: kubectl "
                f"delete {kind} {place}. If it belongs to another run, choose another run.name."
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
