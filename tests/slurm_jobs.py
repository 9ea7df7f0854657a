"""A Slurm job for tests of job scripts and submissions."""

from launch.slurm.job_script import Job
from recipes.schema.launch import ContainerConfig, SlurmConfig

CPU = Job(
    name="two",
    folder="runs/two",
    directory="/scratch/you/stratum",
    words=["-cn", "smoke", "run.name=two", "launch.nodes=2"],
    python="/scratch/you/stratum/.venv/bin/python",
    nodes=2,
    processes=1,
    gpus_per_node=0,
    steps=200,
    restarts=3,
    environment={"PYTHONUNBUFFERED": "1"},
    slurm=SlurmConfig(),
    container=ContainerConfig(),
    code="/scratch/you/stratum/runs/two/logs/code",
)
