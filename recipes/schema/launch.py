"""Fields of the `launch` group: processes, machines, Slurm jobs and containers.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass, field
from typing import Literal

from recipes.schema.fields import Count, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class SlurmConfig:
    """What `stratum launch slurm` asks a cluster for, and how a run continues after a job's time limit."""

    partition: str | None = None
    """Partition of the jobs; null takes the cluster's default."""
    account: str | None = None
    """Account that pays; null takes yours."""
    qos: str | None = None
    """Quality of service; null takes the default."""
    time_limit_minutes: PositiveInt = 240
    """Time limit of one job. A run takes as many jobs as it needs."""
    save_before_end_s: PositiveInt = 300
    """SIGUSR1 reaches the processes this long before the time limit (Slurm: up to 60 s earlier): they save and stop. Must
    cover the longest step and a save."""
    continuation: Literal["requeue", "chain", "none"] = "requeue"
    """Until the last step: `requeue` puts the same job back into the queue; `chain` keeps the next job waiting behind the
    running one, which also survives the loss of its first node where the cluster does not requeue; `none` stops."""
    cpus_per_process: Count = 0
    """CPUs of each process, for its threads; 0 leaves it to the cluster."""
    memory_gib: Count = 0
    """Memory of each node; 0 leaves it to the cluster."""
    options: str = ""
    """More sbatch options, as on its command line: `--exclusive --constraint=ib`."""
    setup: str = ""
    """Shell lines run on the first node before the processes start, without `set -u`: `module load cuda`."""


@dataclass(frozen=True)
class ContainerConfig:
    """Where the processes of a Slurm job find their software. The present folder is mounted at its own path, and so are
    folders of the run and its data that are outside it."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """`pyxis`: srun starts the processes in an enroot image; `apptainer`: by `apptainer exec`; `none`: on the bare node."""
    image: str = ""
    """Image: a `.sqsh` file or `registry#name:tag` for pyxis, a `.sif` file or `docker://name:tag` for apptainer."""
    mounts: str = ""
    """More folders, separated by commas: `HOST:INSIDE,...`."""
    python: str = "python"
    """Python inside the image."""


@dataclass(frozen=True)
class LaunchConfig:
    """How processes are started, find each other, and are started again."""

    nodes: PositiveInt = 1
    """Machines (`stratum launch slurm`)."""
    processes: PositiveInt | None = None
    """Processes on each machine; null takes one a GPU, or without GPUs as many as tensor x pipeline x context need."""
    gpus_per_node: Count = 0
    """GPUs asked for on each node (`stratum launch slurm`); 0 asks for none."""
    timeout_s: PositiveFloat = 600.0
    """Collective operations that take longer fail, naming the ranks that did not arrive, instead of hanging for ever."""
    restarts: Count = 3
    """Restarts after failures in a row that brought no new checkpoint; then the run gives up. Mistakes in the recipe or
    the data are never tried again."""
    backoff_s: PositiveFloat = 10.0
    """Wait before the first restart that follows no new checkpoint (`stratum launch local`), doubled each time in a row, at
    most 5 minutes; after a new checkpoint there is no wait."""
    grace_s: PositiveFloat = 600.0
    """Time to finish the step and save after a signal; what still runs then is killed. Must cover the longest of both."""
    environment: str = ""
    """More environment variables of the processes: `NCCL_DEBUG=INFO NCCL_IB_HCA=mlx5`."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Slurm jobs."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Containers of Slurm jobs."""
