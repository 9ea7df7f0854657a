"""The text of Slurm scripts, a pure function of what a job is: readable, and editable by whoever knows their cluster.

    Job --training_script--> bash:  find the rendezvous -> srun the ranks -> ask after_job.py what comes next -> requeue or end
    Preparation --preparation_script--> bash:  one task of an array job prepares its share of the data

Only bash, Slurm's own commands and `python -P -m launch...` stand in a script; the rule of what comes next is in
launch.local.continuation, and the tests run these scripts on a real Slurm.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from launch.children import FRONT, PYTHON_FLAGS
from recipes.schema.launch import ContainerConfig, SlurmConfig


@dataclass(frozen=True)
class Job:
    """Everything a training script says."""

    name: str
    folder: str
    """The run's folder, as the recipe writes it."""
    directory: str
    """Where the processes start: the folder `stratum launch slurm` was called in."""
    words: Sequence[str]
    """What follows `stratum train`."""
    python: str
    """Python on the bare nodes; in a container its own is used."""
    nodes: int
    processes: int
    """On each node."""
    gpus_per_node: int
    steps: int
    restarts: int
    environment: dict[str, str]
    slurm: SlurmConfig
    container: ContainerConfig
    module: str = "train"
    """What every process runs."""
    checkout: str | None = None
    """Folder of our packages if they are not installed: a container needs it."""


@dataclass(frozen=True)
class Preparation:
    """Everything a script for data preparation says."""

    name: str
    folder: str
    """The folder of the data, for the logs."""
    directory: str
    words: Sequence[str]
    """What follows `stratum prepare`; each task adds its number."""
    python: str
    tasks: int
    cpus: int
    slurm: SlurmConfig
    container: ContainerConfig
    checkout: str | None = None


def training_script(job: Job) -> str:
    """The sbatch script of a training run."""
    slurm, continuation = job.slurm, job.slurm.continuation
    about = {
        "requeue": "Then it goes back into the queue, under the same number, until the last step is reached.",
        "chain": "The next job, which waits behind it, goes on, until the last step is reached.",
        "none": "No other job follows.",
    }[continuation]
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        *([f"--cpus-per-task={slurm.cpus_per_process}"] if slurm.cpus_per_process else []),
        *_common_options(slurm),
        f"--signal=USR1@{slurm.save_before_end_s}",
        "--requeue" if continuation == "requeue" else "--no-requeue",
        "--open-mode=append",
        f"--chdir={shlex.quote(job.directory)}",
        f"--output={shlex.quote(job.folder)}/logs/slurm-%j.log",
    ]
    command = ["-m", "launch.local.rank", job.module, *_with_threads(job)]
    parts = [
        f"""\
#!/bin/bash
# Run {job.name}, written by `stratum launch slurm`. When a job's time is nearly up, Slurm sends SIGUSR1 to the training
# processes, which save and stop. {about}
""",
        "".join(f"#SBATCH {option}\n" for option in options),
        f"""
set -uo pipefail
run={shlex.quote(job.folder)}
export STRATUM_LOGS="$run/logs/slurm-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
mkdir -p "$STRATUM_LOGS"
trap : TERM USR1  # signals are for the training processes; this script outlives them to decide what comes next
""",
        _chain(job) if continuation == "chain" else "",
        """
# Rank 0 listens on the first node, at the address by which Slurm itself reaches it: its name need not resolve.
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node --oneliner "$node" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR="${address:-$node}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
""",
        "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items()),
        f"{slurm.setup.strip()}\n" if slurm.setup.strip() else "",
        f"""
ranks=(srun --kill-on-bad-exit=1 --output="$STRATUM_LOGS/rank-%5t.log"{_rank_cpus(slurm)})
{_python(job, has_gpus=job.gpus_per_node > 0)}

"${{ranks[@]}}" "${{python[@]}}" {_folded(command)}
status=$?

# finished, again or stop; why stands in this job's log. An error is told once, with the rank that failed first. A preempted
# job whose processes end in time counts as completed for Slurm, which then does not bring it back: this script does.
preempted=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -c ' PreemptTime=[0-9]')
next=$({_once(job.container)}"${{python[@]}}" -m launch.slurm.after_job --run "$run" --status "$status" \\
    --steps {job.steps} --restarts {job.restarts} --preempted "$preempted")
""",
        {
            "requeue": 'if [ "$next" = again ]; then scontrol requeue "$SLURM_JOB_ID"; fi\n',
            "chain": 'if [ "$next" != again ] && [ -n "$successor" ]; then scancel "$successor"; fi\n',
            "none": "",
        }[continuation],
        'exit "$status"\n',
    ]
    return "".join(parts)


def preparation_script(job: Preparation) -> str:
    """The sbatch script of an array job that prepares data, one share a task."""
    options = [
        f"--job-name={job.name}",
        f"--array=0-{job.tasks - 1}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={job.cpus}",
        *_common_options(job.slurm),
        "--requeue",
        "--open-mode=append",
        f"--chdir={shlex.quote(job.directory)}",
        f"--output={shlex.quote(job.folder)}/logs/%A_%a.log",
    ]
    command = ["-m", FRONT, "prepare", *job.words]
    return "".join(
        [
            f"""\
#!/bin/bash
# Data {job.folder}, written by `stratum launch slurm --prepare`: {job.tasks} tasks share the work. A task that is started
# again keeps its finished shards; the last one to finish writes the manifest.
""",
            "".join(f"#SBATCH {option}\n" for option in options),
            "\nset -uo pipefail\n",
            f"{job.slurm.setup.strip()}\n" if job.slurm.setup.strip() else "",
            _python(job, has_gpus=False),
            f'\n\n{_once(job.container)}"${{python[@]}}" {_folded(command)} \\\n',
            f'    --task "$SLURM_ARRAY_TASK_ID/{job.tasks}"\n',
        ]
    )


def _common_options(slurm: SlurmConfig) -> list[str]:
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    hours, minutes = divmod(slurm.time_limit_minutes, 60)
    return [
        *[f"--{name}={value}" for name, value in named.items() if value is not None],
        *([f"--mem={slurm.memory_gib}G"] if slurm.memory_gib else []),
        *shlex.split(slurm.options),
        f"--time={hours:02}:{minutes:02}:00",
    ]


def _chain(job: Job) -> str:
    return """
# The next job of the chain waits from now on, so that not even the loss of this node ends the run; see the end of the script.
successor=$(sbatch --parsable --dependency=afterany:"$SLURM_JOB_ID" "$run/logs/job.sh") && echo "$successor" >> "$run/logs/jobs"
"""


def _rank_cpus(slurm: SlurmConfig) -> str:
    """srun does not take over --cpus-per-task from sbatch since Slurm 22.05."""
    return f" --cpus-per-task={slurm.cpus_per_process}" if slurm.cpus_per_process else ""


def _with_threads(job: Job) -> list[str]:
    """The words, with the threads of a process where the recipe says how many CPUs Slurm binds each to."""
    has_own = any(word.lstrip("+").startswith("run.threads=") for word in job.words)
    if has_own or not job.slurm.cpus_per_process:
        return list(job.words)
    return [*job.words, f"run.threads={job.slurm.cpus_per_process}"]


def _once(container: ContainerConfig) -> str:
    """What starts one process beside the ranks' step: srun where only srun can enter the container."""
    return "srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 " if container.kind == "pyxis" else ""


def _python(job: Job | Preparation, *, has_gpus: bool) -> str:
    """Lines that set `python`, the words that start Python, in the container where there is one.

    Python does not search the working directory (launch.children). A container that has no installation of this project
    still finds the checkout that the job was submitted from, by PYTHONPATH.
    """
    container, directory = job.container, job.directory
    folders = dict.fromkeys(filter(None, (directory, job.checkout)))
    mounts = ",".join([*(f"{folder}:{folder}" for folder in folders), *filter(None, [container.mounts])])
    inside = shlex.join([container.python, *PYTHON_FLAGS])
    if job.checkout is not None:
        inside = f'env "PYTHONPATH="{shlex.quote(job.checkout)}"${{PYTHONPATH:+:$PYTHONPATH}}" {inside}'
    match container.kind:
        case "none":
            return f"python=({shlex.join([job.python, *PYTHON_FLAGS])})"
        case "apptainer":
            words = ["apptainer", "exec", *(["--nv"] if has_gpus else []), "--bind", mounts, "--pwd", directory]
            return f"python=({shlex.join([*words, container.image])} {inside})"
        case "pyxis":
            flags = [
                f"--container-image={container.image}",
                f"--container-mounts={mounts}",
                f"--container-workdir={directory}",
            ]
            return f'container=({shlex.join(flags)})\npython=("${{container[@]}}" {inside})'


def _folded(words: Sequence[str]) -> str:
    """Words of a command, quoted, folded at about 110 characters."""
    lines, line = [], ""
    for word in map(shlex.quote, words):
        if line and len(line) + len(word) > 110:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return " \\\n    ".join([*lines, line])
