"""Fields of the `launch` group: processes, machines, Slurm jobs, containers and Kubernetes.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass, field
from typing import Literal

from recipes.schema.fields import Count, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class SlurmConfig:
    """What `stratum launch slurm` requests from a cluster, and how a run continues after a job's time limit."""

    partition: str | None = None
    """Partition of the jobs; null: the cluster's default."""
    account: str | None = None
    """Account that is charged; null: your default account."""
    qos: str | None = None
    """Quality of service; null: the default."""
    time_limit_minutes: PositiveInt = 240
    """Time limit of one job. A run takes as many jobs as it needs."""
    save_before_end_s: PositiveInt = 300
    """Seconds before the time limit (Slurm: up to 60 s earlier) at which the processes get SIGUSR1, save and stop. At least the
    longest step and a save."""
    continuation: Literal["requeue", "chain", "none"] = "requeue"
    """How an unfinished run continues after its job ends. `requeue`: the same job goes back into the queue. `chain`: the next job
    already waits for the running one, so the run also survives the loss of the first node on clusters that do not requeue.
    `none`: it stops."""
    spare_nodes: Count = 0
    """Additional nodes of each job, without processes. One of them takes the place of a node that is lost, or on which ranks
    failed twice, in the same job. They are charged like the others. Needs `continuation: chain` or
    `none`, because Slurm does not requeue such a job if its first node is lost. 0: the next job gets other nodes."""
    cpus_per_process: Count = 0
    """CPUs of each process, for its threads; 0: the cluster decides."""
    memory_gib: Count = 0
    """Memory of each node; 0: the cluster decides."""
    options: str = ""
    """Additional sbatch options, as on its command line: `--exclusive --constraint=ib`."""
    setup: str = ""
    """Shell lines run on the first node before the processes start, without `set -u`: `module load cuda`."""


@dataclass(frozen=True)
class ContainerConfig:
    """Container of the processes of a Slurm job. The current folder is mounted at its own path, as are folders of the run and
    its data outside it."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """`pyxis`: srun starts the processes in an enroot image. `apptainer`: `apptainer exec` starts them. `none`: no container."""
    image: str = ""
    """Image: a `.sqsh` file or `registry#name:tag` for pyxis, a `.sif` file or `docker://name:tag` for apptainer."""
    mounts: str = ""
    """Additional folders, separated by commas: `HOST:INSIDE,...`."""
    python: str = "python"
    """Python inside the image."""


@dataclass(frozen=True)
class KubernetesConfig:
    """What `stratum launch kubernetes` requests from a cluster: `launch.nodes` pods with `launch.gpus_per_node` GPUs each."""

    image: str = ""
    """Image with this project installed, as `registry/name:tag`."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node pulls the image."""
    namespace: str | None = None
    """Namespace of the run; null: that of the current kubectl context."""
    volume_claim: str | None = None
    """Existing claim of the volume for runs and data; ReadWriteMany if there are several nodes. null: an empty volume that is
    lost with the pod; needs `run.storage`."""
    folder: str = "/work"
    """Where the volume is mounted, and the working directory: relative folders of the recipe are below it."""
    secrets: str = ""
    """Names of Secrets whose keys become environment variables: `aws-keys wandb`. The manifest contains only these names."""
    service_account: str | None = None
    """Service account of the pods, such as one with a role for the bucket; null: the namespace's default."""
    node_selector: str = ""
    """Labels that nodes must have: `NAME=VALUE ...`."""
    tolerations: str = ""
    """Tolerated taints: `NAME[=VALUE]:EFFECT ...`, such as `nvidia.com/gpu:NoSchedule`."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the GPU resource."""
    cpus: Count = 0
    """CPUs of each pod; 0: no request."""
    memory_gib: Count = 0
    """Memory of each pod; 0: no request."""
    shared_memory_gib: PositiveInt = 16
    """Size limit of /dev/shm, which NCCL uses between the processes of a pod. It counts as memory of the pod."""
    queue: str | None = None
    """Kueue's local queue; null: start at once."""
    priority_class: str | None = None
    """Priority class of the pods."""
    topology: str | None = None
    """Node label, such as that of a rack; the run gets one value of it for itself (JobSet's exclusive placement). null: any."""
    pod: str | None = None
    """YAML file whose fields are added to the pod's spec: affinity, hostNetwork, a scheduler."""


@dataclass(frozen=True)
class LaunchConfig:
    """How processes are started, connected and restarted."""

    nodes: PositiveInt = 1
    """Machines (`stratum launch slurm`, `stratum launch kubernetes`)."""
    processes: PositiveInt | None = None
    """Processes on each machine; null: one per GPU, or tensor x pipeline x context without GPUs."""
    gpus_per_node: Count = 0
    """GPUs requested on each node (Slurm and Kubernetes); 0: none."""
    timeout_s: PositiveFloat = 600.0
    """Time limit of a collective operation. After it the operation fails and names the ranks that did not arrive."""
    restarts: Count = 3
    """Maximum restarts in a row without a new checkpoint; then the run ends. Mistakes in the recipe or the data cause no
    restart."""
    backoff_s: PositiveFloat = 10.0
    """Wait before the first restart without a new checkpoint (`stratum launch local`). Each further wait is twice as long, at
    most 5 minutes. No wait after a new checkpoint."""
    least_processes: PositiveInt | None = None
    """`stratum launch local`: if one rank fails first twice in a row without progress and no spare GPU is left, continue with
    fewer data-parallel replicas at the same global batch, and at least this many processes. Needs a checkpoint, because another
    layout cannot use copies in memory. null: never."""
    regrow_s: PositiveFloat = 3600.0
    """Time after which a run that continues with fewer processes (`least_processes`) saves and starts again with all of them,
    because the device may be well again."""
    grace_s: PositiveFloat = 600.0
    """Time after a signal for the step and a save before processes are killed: at least the longest step and a save."""
    environment: str = ""
    """Additional environment variables for the processes: `NCCL_DEBUG=INFO NCCL_IB_HCA=mlx5`."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Slurm jobs."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Containers of Slurm jobs."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """Kubernetes pods."""
