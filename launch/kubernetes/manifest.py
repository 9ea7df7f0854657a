"""The manifests of a run, as a pure function of its recipe: a JobSet, or a TrainJob of Kubeflow
Trainer that makes the same JobSet.

    JobSet NAME                      restarts: all pods together, from the newest checkpoint
      job NAME-node-0                one indexed Job: pod i is node i
        pod NAME-node-0-i            `stratum launch node` starts the processes; SIGTERM makes them save and stop

What follows the end of a pod, by the exit status of `stratum launch node` (docs/launch.md):

    0                                finished
    2, 3, 4                          a user must act first: the run fails (podFailurePolicy, then failurePolicy)
    a pod is evicted or preempted    restart, not counted
    other                            restart, at most launch.restarts times

A TrainJob cannot set what follows the end of a pod, so it comes with a TrainingRuntime of its own, whose template is the JobSet.
Trainer 2.3 copies the template. It adds its own variables (PET_*, for torchrun) only if the runtime asks for torch; this one does
not, because `stratum launch node` starts the processes. Trainer's admission requires the container's name and the label.

Fields: JobSet v1alpha2 (jobset.sigs.k8s.io), trainer.kubeflow.org/v1alpha1, batch/v1, core/v1.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from launch.children import rank_environment
from launch.local.node import PORT
from recipes.schema.errors import CorruptionError, NumericsError, StratumError
from recipes.schema.launch_rules import environment_of, processes_per_node
from recipes.schema.recipe import Recipe

_CONTAINER = "node"
_TRAINER = "trainer.kubeflow.org"
_FINAL = (StratumError.status, NumericsError.status, CorruptionError.status)
_AFTER_GRACE_S = 30
"""Seconds that a pod gets beyond launch.grace_s, so that the launcher can report what it had to kill."""
_QUEUE = "kueue.x-k8s.io/queue-name"
_LONGEST_NAME = 40
"""JobSet adds `-node-0-00000-xxxxx` to it; the result must fit into a host name (63)."""


def object_name(run_name: str) -> str:
    """A run's name as the name of an object: lower case, digits and `-`."""
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")[:_LONGEST_NAME].rstrip("-")
    return name if name[:1].isalpha() else f"run-{name}".rstrip("-")


def jobset(recipe: Recipe, words: Sequence[str], *, pod_fields: dict[str, Any] | None = None) -> dict[str, Any]:
    """The manifest. words: after `stratum launch node`. pod_fields: further fields of the pod's spec (launch.kubernetes.pod)."""
    launch, kubernetes = recipe.launch, recipe.launch.kubernetes
    name = object_name(recipe.run.name)
    metadata: dict[str, Any] = {"name": name, "labels": {"app.kubernetes.io/name": "stratum"}}
    if kubernetes.namespace:
        metadata["namespace"] = kubernetes.namespace
    if kubernetes.queue:
        metadata["labels"][_QUEUE] = kubernetes.queue
    if kubernetes.topology:
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": kubernetes.topology}
    job = {
        "completionMode": "Indexed",
        "completions": launch.nodes,
        "parallelism": launch.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": list(_FINAL)},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": "stratum"}},
            "spec": _pod(recipe, words, name=name) | (pod_fields or {}),
        },
    }
    # The messages are those of Kubernetes' Job controller, which names the rule of podFailurePolicy that matched.
    rules = [
        {
            "name": "stopAfterAnErrorThatWouldRepeat",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f".*exit code ({'|'.join(map(str, _FINAL))}) .*"],
        },
        {
            "name": "restartAfterAnEviction",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [".*DisruptionTarget.*"],
        },
    ]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": launch.restarts,
                "restartStrategy": "BlockingRecreate",
                "rules": rules,
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def trainjob(
    recipe: Recipe, words: Sequence[str], *, pod_fields: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the TrainingRuntime, the TrainJob) of the same run. The arguments are those of `jobset`.

    The runtime's name ends with a hash of its content, so a job never uses the runtime of an earlier submission.
    """
    whole = jobset(recipe, words, pod_fields=pod_fields)
    metadata, spec = whole["metadata"], whole["spec"]
    spec["replicatedJobs"][0]["template"]["metadata"] = {
        "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    }
    template = {"spec": spec} | (
        {"metadata": {"annotations": found}} if (found := metadata.pop("annotations", None)) else {}
    )
    content = {"mlPolicy": {"numNodes": recipe.launch.nodes}, "template": template}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{metadata['name']}-{digest}"
    labels = {key: value for key, value in metadata["labels"].items() if key != _QUEUE}
    labels["app.kubernetes.io/instance"] = metadata["name"]
    api = {"apiVersion": f"{_TRAINER}/v1alpha1"}
    return (
        {**api, "kind": "TrainingRuntime", "metadata": {**metadata, "name": name, "labels": labels}, "spec": content},
        {
            **api,
            "kind": "TrainJob",
            "metadata": metadata,
            "spec": {"runtimeRef": {"apiGroup": _TRAINER, "kind": "TrainingRuntime", "name": name}},
        },
    )


def manifest_text(*manifests: dict[str, Any], about: str) -> str:
    """The manifests as YAML, with a comment on top."""
    lines = "".join(f"# {line}\n" for line in about.splitlines())
    return lines + "---\n".join(yaml.safe_dump(one, sort_keys=False, width=120) for one in manifests)


def _pod(recipe: Recipe, words: Sequence[str], *, name: str) -> dict[str, Any]:
    launch, kubernetes = recipe.launch, recipe.launch.kubernetes
    processes = processes_per_node(recipe)
    variables = {
        **rank_environment(recipe, threads=recipe.run.threads or (kubernetes.cpus // processes) or None),
        **environment_of(launch.environment),
        "MASTER_ADDR": f"{name}-node-0-0.{name}",
        "MASTER_PORT": str(PORT),
    }
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    environment: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in variables.items()]
    environment.append({"name": "NODE_RANK", "valueFrom": index})
    requests: dict[str, Any] = {}
    if kubernetes.cpus:
        requests["cpu"] = str(kubernetes.cpus)
    if kubernetes.memory_gib:
        requests["memory"] = f"{kubernetes.memory_gib}Gi"
    limits = {key: value for key, value in requests.items() if key == "memory"}
    if launch.gpus_per_node:
        requests[kubernetes.gpu_resource] = limits[kubernetes.gpu_resource] = str(launch.gpus_per_node)
    claim = {"persistentVolumeClaim": {"claimName": kubernetes.volume_claim}}
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": kubernetes.image,
        "imagePullPolicy": kubernetes.pull_policy,
        # No shell: the launcher is process 1, so it gets SIGTERM.
        "command": ["stratum", "launch", "node", *words],
        "workingDir": kubernetes.folder,
        "env": environment,
        "resources": {"requests": requests, "limits": limits},
        "volumeMounts": [
            {"name": "work", "mountPath": kubernetes.folder},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if secrets := kubernetes.secrets.split():
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in secrets]
    if launch.gpus_per_node:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # InfiniBand pins memory
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": int(launch.grace_s) + _AFTER_GRACE_S,
        "containers": [container],
        "volumes": [
            {"name": "work", **(claim if kubernetes.volume_claim else {"emptyDir": {}})},
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": f"{kubernetes.shared_memory_gib}Gi"},
            },
        ],
    }
    if kubernetes.service_account:
        pod["serviceAccountName"] = kubernetes.service_account
    if kubernetes.priority_class:
        pod["priorityClassName"] = kubernetes.priority_class
    if kubernetes.node_selector:
        pod["nodeSelector"] = dict(word.split("=", 1) for word in kubernetes.node_selector.split())
    if kubernetes.tolerations:
        pod["tolerations"] = [_toleration(word) for word in kubernetes.tolerations.split()]
    return pod


def _toleration(word: str) -> dict[str, str]:
    taint, _, effect = word.rpartition(":")
    key, sign, value = taint.partition("=")
    found = {"key": key, "operator": "Equal" if sign else "Exists", "effect": effect}
    return found | ({"value": value} if sign else {})
