"""The JobSet manifest of a run, as a pure function of its recipe.

    JobSet NAME                      restarts: all pods together, from the newest checkpoint
      job NAME-node-0                one indexed Job: pod i is node i
        pod NAME-node-0-i            `stratum launch node` starts the processes; SIGTERM makes them save and stop

What follows the end of a pod, by the exit status of `stratum launch node` (docs/launch.md):

    0                                finished
    2, 3, 4                          a user must act first: the run fails (podFailurePolicy, then failurePolicy)
    a pod is evicted or preempted    restart, not counted
    other                            restart, at most launch.restarts times

Fields: JobSet v1alpha2 (jobset.sigs.k8s.io), batch/v1, core/v1.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from launch.children import rank_environment
from launch.local.node import PORT
from recipes.schema.errors import CorruptionError, NumericsError, StratumError
from recipes.schema.launch_rules import environment_of, processes_per_node
from recipes.schema.recipe import Recipe

_CONTAINER = "trainer"
_FINAL = (StratumError.status, NumericsError.status, CorruptionError.status)
_AFTER_GRACE_S = 30
"""Seconds that a pod gets beyond launch.grace_s, so that the launcher can report what it had to kill."""
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
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = kubernetes.queue
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


def manifest_text(manifest: dict[str, Any], *, about: str) -> str:
    """The manifest as YAML, with a comment on top."""
    lines = "".join(f"# {line}\n" for line in about.splitlines())
    return lines + yaml.safe_dump(manifest, sort_keys=False, width=120)


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
