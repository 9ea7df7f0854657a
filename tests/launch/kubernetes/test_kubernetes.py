"""`stratum launch kubernetes` and `stratum launch node`: the manifest, what is refused, and what a node's processes see.

The manifest was validated against the published schemas (`test_kubernetes_schemas.py`); it was not run on a cluster.
"""

import re
import shlex
import stat
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_recipes import FULL, recipe_for
from rules.rooms import ROOT

from launch.kubernetes.command import main
from launch.kubernetes.manifest import jobset, object_name, trainjob
from launch.local.failures import log_of
from launch.local.node import node_of
from launch.local.supervise import Node, StopRequest, run_attempt
from recipes.schema.command import dotted_keys
from recipes.schema.errors import RecipeError, refuse
from recipes.schema.launch_rules import kubernetes_problems
from recipes.schema.recipe import Recipe
from train.stratum import COMMANDS


def test_the_manifest_says_what_the_recipe_says() -> None:
    manifest = jobset(recipe_for(environment="NCCL_DEBUG=INFO"), ["-cn", "smoke", "optim.lr=1e-3"])
    assert manifest["metadata"]["name"] == "my-run-1"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "large"
    spec = manifest["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 2, 2, 0)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["stratum", "launch", "node", "-cn", "smoke", "optim.lr=1e-3"], "no shell: PID 1"
    assert pod["terminationGracePeriodSeconds"] >= 300
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    # JobSet's documented host names: JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN
    assert variables["MASTER_ADDR"] == "my-run-1-node-0-0.my-run-1" and spec["network"]["subdomain"] == "my-run-1"
    assert variables["NCCL_DEBUG"] == "INFO" and "NODE_RANK" in variables
    assert container["resources"]["limits"] == {"memory": "100Gi", "nvidia.com/gpu": "8"}
    assert container["envFrom"] == [{"secretRef": {"name": "aws-keys"}}, {"secretRef": {"name": "wandb"}}]
    assert pod["tolerations"][1] == {"key": "team", "operator": "Equal", "effect": "NoExecute", "value": "a"}
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


def test_a_trainjob_makes_the_same_jobset() -> None:
    """As Trainer 2.3 builds it: the runtime's template, named and placed like the TrainJob; the pods are those of mlPolicy."""
    words = ["-cn", "smoke"]
    runtime, job = trainjob(recipe_for(), words)
    expected = jobset(recipe_for(), words)
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"], "name": runtime["metadata"]["name"]
    }  # fmt: skip
    assert runtime["metadata"]["namespace"] == job["metadata"]["namespace"], (
        "a runtime is looked up in the job's namespace"
    )
    assert "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    template = runtime["spec"]["template"]
    (replicated,) = template["spec"]["replicatedJobs"]
    labels = replicated["template"].pop("metadata")["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"} and replicated["replicas"] == 1
    assert template["spec"] == expected["spec"], "so the host name in MASTER_ADDR exists too"
    assert {**job["metadata"], **template["metadata"]} == expected["metadata"]
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 2}, "no torch policy: Trainer adds no torchrun"
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert container["name"] == "node", "Trainer's admission requires this name"
    assert trainjob(recipe_for(), words)[0]["metadata"] == runtime["metadata"]
    assert trainjob(recipe_for(), [*words, "run.steps=3"])[0]["metadata"]["name"] != runtime["metadata"]["name"]


def test_errors_that_would_repeat_are_not_retried_and_evictions_are_not_counted() -> None:
    """The messages are those of Kubernetes' Job controller (pkg/controller/job/pod_failure_policy.go, 1.33)."""
    spec = jobset(recipe_for(), [])["spec"]
    rules = spec["failurePolicy"]["rules"]
    assert all(re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]) for rule in rules), "JobSet's CRD"
    messages = {
        "Container node for pod team/a failed with exit code 2 matching FailJob rule at index 0": "FailJobSet",
        "Container node for pod team/a failed with exit code 3 matching FailJob rule at index 0": "FailJobSet",
        "Pod team/a has condition DisruptionTarget matching FailJob rule at index 1": "RestartJobSetAndIgnoreMaxRestarts",
        "Container node for pod team/a failed with exit code 20 matching FailJob rule at index 0": None,
    }
    for message, action in messages.items():
        chosen = (r["action"] for r in rules if any(re.search(p, message) for p in r["onJobFailureMessagePatterns"]))
        assert next(chosen, None) == action
    policy = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert policy[0]["onExitCodes"]["values"] == [2, 3, 4]


@pytest.mark.parametrize(
    ("kubernetes", "launch", "words", "names"),
    [
        ({"image": ""}, {}, [], "kubernetes.image is empty"),
        ({"volume_claim": None}, {}, [], "ReadWriteMany"),
        ({"volume_claim": None}, {"nodes": 1}, [], "lost with its pod"),
        ({"volume_claim": None}, {"nodes": 1}, [], "empty volume at /work"),
        ({"folder": "work"}, {}, [], "absolute folder"),
        ({"node_selector": "gpu"}, {}, [], "NAME=VALUE"),
        ({"tolerations": "gpu"}, {}, [], "EFFECT"),
        ({"secrets": "AWS_KEY=abc"}, {}, [], "not a name"),
        ({}, {"processes": 9}, [], "its own GPU"),
        ({}, {}, ["data.folder=s3://me:pw@bucket/x"], "password"),
        ({}, {}, ["--config-dir=mine"], "pods do not have"),
    ],
)
def test_what_cannot_run_is_refused(
    kubernetes: dict[str, Any], launch: dict[str, Any], words: list[str], names: str
) -> None:
    recipe = recipe_for(replace(FULL, **kubernetes), **launch)
    with pytest.raises(RecipeError, match=names) as caught:
        refuse(kubernetes_problems(recipe, words=words, processes=launch.get("processes", 8)))
    assert ":pw@" not in str(caught.value)
    assert not kubernetes_problems(recipe_for(), words=["-cn", "smoke"], processes=8)


def test_names_of_objects_are_host_names() -> None:
    for name in ("My run/1", "1b", "ü", "x" * 300, "a..b", "-a-"):
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,42}[a-z0-9])?", object_name(name)), object_name(name)


def test_the_command_prints_or_submits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pod.yaml").write_text("hostNetwork: true\n")
    words = ["-cn", "smoke", "launch.kubernetes.image=r/s:1", "run.storage=s3://bucket/runs"]
    words += ["data.folder=s3://bucket/data"]
    assert main([*words, "launch.kubernetes.pod=pod.yaml", "--dry-run"]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["hostNetwork"] is True
    (tmp_path / "pod.yaml").write_text("containers: []\n")
    assert main([*words, "launch.kubernetes.pod=pod.yaml", "--dry-run"]) == 2
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text('#!/bin/sh\necho "$@" > called\necho jobset created\n')
    kubectl.chmod(kubectl.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{kubectl.parent}:/usr/bin:/bin")
    assert main(words) == 0
    assert (tmp_path / "called").read_text().split() == ["create", "-f", "runs/smoke/logs/jobset.yaml"]
    assert main([*words, "launch.kubernetes.namespace=team"]) == 0
    assert "kubectl get jobset smoke --namespace team\n" in capsys.readouterr().out
    kubectl.write_text('#!/bin/sh\necho "$@" >> both\n')
    assert main([*words, "--kind", "trainjob"]) == 0 and "kubectl get trainjob smoke\n" in capsys.readouterr().out
    logs = "runs/smoke/logs"
    assert (tmp_path / "both").read_text() == f"apply -f {logs}/trainingruntime.yaml\ncreate -f {logs}/trainjob.yaml\n"
    kubectl.write_text('#!/bin/sh\necho "Error from server (AlreadyExists): ..." >&2\nexit 1\n')
    assert main(words) == 2
    assert "kubectl delete jobset smoke. If it belongs" in capsys.readouterr().err


def test_ranks_of_a_node_and_the_status_of_the_first_that_fails(tmp_path: Path) -> None:
    show = (
        "import os; print(*(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
    )
    ends = {"": 0, "; import sys; sys.exit(2 if os.environ['RANK'] == '3' else 0)": 2}
    for number, (more, status) in enumerate(ends.items()):
        logs = tmp_path / str(number)
        with StopRequest() as stop:
            end = run_attempt(
                [sys.executable, "-S", "-c", show + more], processes=2, environment={}, logs=logs, shown=frozenset(),
                grace_s=5, stop=stop, use_terminal=False, node=Node(1, 2, "host", 29500),
            )  # fmt: skip
        assert end.status == status
        assert [log_of(logs, rank).read_text().split() for rank in (2, 3)] == [
            ["2", "0", "4", "host", "29500"], ["3", "1", "4", "host", "29500"],
        ]  # fmt: skip


def test_a_node_needs_its_place() -> None:
    assert node_of({}, nodes=1) == Node(0, 1, "127.0.0.1", 29500)
    assert node_of({"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}, nodes=2) == Node(1, 2, "a", 7)
    for variables in (
        {},
        {"NODE_RANK": "2"},
        {"NODE_RANK": "1"},
        {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "x"},
    ):
        with pytest.raises(RecipeError, match="Set it to"):
            node_of(variables, nodes=2)


def test_the_image_and_the_task_of_sky_name_what_exists() -> None:
    """Their text only: neither a builder nor SkyPilot is run here."""
    image = (ROOT / "docs" / "containers" / "Containerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"EXTRAS=([\w,]+)", image)
    assert len(named) == 2 and {extra for names in named for extra in names.split(",")} <= extras.keys()
    assert re.search(r"^FROM \S+python:3\.12", image, re.M) and "constraints.txt" in image
    task = yaml.safe_load((ROOT / "docs" / "containers" / "skypilot.yaml").read_text())
    words = shlex.split(task["run"].split("exec ")[1].replace("\\\n", " "))
    assert " ".join(words[1:3]) in COMMANDS
    fields = dotted_keys(Recipe)
    assert {word.split("=")[0] for word in words if "=" in word} <= set(fields)
