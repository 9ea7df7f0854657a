"""Manifests against the published schemas: batch/v1 of Kubernetes (kubernetes-validate), JobSet's and Trainer's
(kubeflow-trainer-api).

`make test-oracle`. tests/data/sources/install_clouds.sh fetches both packages into .clouds/kubernetes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubernetes_recipes import recipes

from launch.kubernetes.manifest import jobset, trainjob

CLOUDS = Path(__file__).resolve().parents[3] / ".clouds" / "kubernetes"
pytestmark = pytest.mark.oracle

# In a process of its own, whose path begins with the fetched packages. The models of kubeflow-trainer-api drop names that they
# do not know, so a field that is misspelt is missing in what they give back.
PROGRAM = """
import sys, yaml, kubernetes_validate
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

MODELS = {"JobSet": JobsetV1alpha2JobSet, "TrainJob": TrainerV1alpha1TrainJob, "TrainingRuntime": TrainerV1alpha1TrainingRuntime}

def dropped(given, found, place=""):
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(found, dict) or key not in found:
                yield f"{place}.{key}"
            else:
                yield from dropped(value, found[key], f"{place}.{key}")
    elif isinstance(given, list):
        for one, other in zip(given, found, strict=True):
            yield from dropped(one, other, place)
    elif given != found:
        yield f"{place}: {given!r}, {found!r}"

for manifest in yaml.safe_load_all(sys.stdin):
    print(*dropped(manifest, MODELS[manifest["kind"]].from_dict(manifest).to_dict()))
    if manifest["kind"] == "TrainJob":
        continue
    spec = manifest["spec"] if manifest["kind"] == "JobSet" else manifest["spec"]["template"]["spec"]
    template = spec["replicatedJobs"][0]["template"]
    try:
        kubernetes_validate.validate({"apiVersion": "batch/v1", "kind": "Job", **template, "metadata": {"name": "x"}},
                                     "1.37", strict=True)
    except kubernetes_validate.ValidationError as error:
        print(error.message)
"""


def complaints(manifests: list[dict[str, object]]) -> str:
    if not CLOUDS.is_dir():
        pytest.skip("the packages with the schemas could not be fetched (tests/data/sources/install_clouds.sh)")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=yaml.safe_dump_all(manifests), env={"PYTHONPATH": str(CLOUDS)},
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_manifests_have_only_published_fields() -> None:
    words = ["-cn", "smoke"]
    assert complaints([jobset(recipe, words) for recipe in recipes()]) == ""
    assert complaints([manifest for recipe in recipes() for manifest in trainjob(recipe, words)]) == ""


def test_the_schemas_find_misspelt_fields() -> None:
    manifest = jobset(recipes()[0], [])
    manifest["spec"]["failurePolicy"]["maxRestart"] = 1
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 1
    found = complaints([manifest])
    assert ".maxRestart" in found and "backofLimit" in found
    runtime, job = trainjob(recipes()[0], [])
    runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 1
    runtime["spec"]["mlPolicy"]["numNode"] = 1
    job["spec"]["podTemplateOverrides"] = []  # of Trainer before 2.2
    found = complaints([runtime, job])
    assert ".numNode" in found and "backofLimit" in found and ".podTemplateOverrides" in found
