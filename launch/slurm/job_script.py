"""The text of Slurm scripts, as a pure function of the job. Users can read the scripts and edit them for their cluster.

    Job --training_script--> bash:  find the rendezvous -> srun the ranks -> launch.slurm.after_job decides what follows
    Preparation --preparation_script--> bash:  one task of an array job prepares its share of the data

A script uses only bash, Slurm's own commands and `python -P -m launch...`. The rule for what follows a job is in
launch.local.continuation; the tests run these scripts on a real Slurm. Every value from a recipe goes through `quoted` (for
bash), `option` (for #SBATCH lines) or `one_line` (for comments). Words that contain a password or a token are not in the
script: it reads them from a file that only the user can read (`credentials_text`).
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from launch.children import FRONT, PYTHON_FLAGS
from launch.starts import STARTS
from recipes.schema.credentials import without_credentials
from recipes.schema.errors import RecipeError
from recipes.schema.launch import ContainerConfig, SlurmConfig

CREDENTIALS = "credentials.sh"
"""File next to a script, with mode 600: the words of its command that contain a password or a token."""


@dataclass(frozen=True)
class Job:
    """Everything a training script depends on."""

    name: str
    folder: str
    """The run's folder, as the recipe writes it."""
    directory: str
    """Working directory of the processes: the one of `stratum launch slurm`."""
    words: Sequence[str]
    """Words after `stratum train`."""
    python: str
    """Python on the nodes; containers use their own."""
    nodes: int
    processes: int
    """On each node."""
    gpus_per_node: int
    steps: int
    restarts: int
    environment: dict[str, str]
    slurm: SlurmConfig
    container: ContainerConfig
    spare_nodes: int = 0
    timeout_s: float = 600.0
    """launch.timeout_s: how long ranks wait for one that hangs."""
    module: str = "train"
    """Module that every process runs."""
    code: str = ""
    """Folder with the copy of the packages made at submission; "" uses the installed ones."""
    checkout: str | None = None
    """Folder of our packages if they are not installed: a container needs it."""
    mounts: Sequence[str] = ()
    """Folders outside `directory` that the run reads or writes; a container mounts them at their own paths."""


@dataclass(frozen=True)
class Preparation:
    """Everything a script for data preparation depends on."""

    name: str
    folder: str
    """Folder of the data; its logs go there."""
    directory: str
    words: Sequence[str]
    """Words after `stratum prepare`; each task adds its number."""
    python: str
    tasks: int
    cpus: int
    slurm: SlurmConfig
    container: ContainerConfig
    code: str = ""
    checkout: str | None = None
    mounts: Sequence[str] = ()


def quoted(value: str) -> str:
    """A value as one word of bash."""
    return shlex.quote(value)


def option(word: str) -> str:
    """One option of an #SBATCH line. Raises RecipeError if it has a line break."""
    if "\n" in word or "\r" in word:
        raise RecipeError(
            f"{word!r} contains a line break, which Slurm options must not. Choose another name or value."
        )
    return shlex.quote(word)


def one_line(value: str) -> str:
    """A value in a comment, without line breaks, which would end the comment."""
    return " ".join(value.split())


def training_script(job: Job) -> str:
    """The sbatch script of a training run. Raises RecipeError for a value that Slurm cannot represent."""
    slurm, continuation = job.slurm, job.slurm.continuation
    about = {
        "requeue": "Then it goes back into the queue, under the same number, until the last step is reached.",
        "chain": "The next job, which waits behind it, continues, until the last step is reached.",
        "none": "No other job follows.",
    }[continuation]
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes + job.spare_nodes}",
        *(["--no-kill"] if job.spare_nodes else []),
        f"--ntasks-per-node={job.processes}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        *([f"--cpus-per-task={slurm.cpus_per_process}"] if slurm.cpus_per_process else []),
        *_common_options(slurm, slurm.options),
        f"--signal=USR1@{slurm.save_before_end_s}",
        "--requeue" if continuation == "requeue" else "--no-requeue",
        "--open-mode=append",
        f"--chdir={job.directory}",
        f"--output={_escape_patterns(job.folder)}/logs/slurm-%j.log",
    ]
    one_task = _one_task(job.container)
    command = ["-m", "launch.local.rank", job.module, *_with_threads(job)]
    parts = [
        f"""\
#!/bin/bash
# Run {one_line(job.name)}, written by `stratum launch slurm`. When a job's time is nearly up, Slurm sends SIGUSR1 to the
# training processes, which save and stop. {about}
""",
        "".join(f"#SBATCH {option(word)}\n" for word in options),
        f"""
trap : TERM USR1  # signals are for the training processes; this script lives on to decide what follows
stratum_logs={quoted(job.folder)}/logs

# In every case: after {job.restarts + 1} starts without a new checkpoint between them, the run ends.
newest=$(cat {quoted(job.folder)}/checkpoints/latest 2>/dev/null)
read -r seen starts 2>/dev/null < "$stratum_logs/starts"
[ "$seen" = "${{newest:-none}}" ] || starts=0
starts=$((starts + 1))
echo "${{newest:-none}} $starts" > "$stratum_logs/starts"
if [ "$starts" -gt {job.restarts + 1} ]; then
  echo "stop: {job.restarts + 1} starts in a row brought no new checkpoint (launch.restarts={job.restarts})" >&2
  exit 1
fi
""",
        _setup(slurm),
        f"""
run={quoted(job.folder)}
logs="$run/logs/slurm-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
""",
        _submit(job) if continuation != "none" else "",
        _spares(job.nodes) if job.spare_nodes else "",
        _RENDEZVOUS,
        "choose_nodes || exit 1\n"
        if job.spare_nodes
        else 'meet_at "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"\n',
        "".join(f"export {name}={quoted(value)}\n" for name, value in job.environment.items()),
        _pythonpath_line(job.code),
        f"""\
{_python(job)}
{_credentials(job.words, f"{job.folder}/logs")}{_environment_check(job)}
attempt=1
while :; do
  # Each start has its own logs, and its own port: the last start may not have released its port yet.
  export STRATUM_LOGS="$logs" MASTER_PORT=$((20000 + (SLURM_JOB_ID + 4001 * ${{SLURM_RESTART_COUNT:-0}} + 401 * attempt) % 12000))
  if [ "$attempt" -gt 1 ]; then STRATUM_LOGS="$logs-$attempt"; fi
  mkdir -p "$STRATUM_LOGS"
  ranks=(srun --kill-on-bad-exit=1 --output="${{STRATUM_LOGS//%/%%}}/rank-%5t.log"{_rank_cpus(slurm)}{_rank_nodes(job)})
  printf '{{"kind": "attempt", "time": %s}}\\n' "$(date +%s.%N)" >> "$stratum_logs/{STARTS}"
  "${{ranks[@]}}" "${{python[@]}}" {_folded(command)} 2> "$STRATUM_LOGS/srun.log"
  status=$? ended=$(date +%s.%N)
  cat "$STRATUM_LOGS/srun.log" >&2

  # finished, here (again in these nodes), again or stop; the reason is in this job's log. An error is shown once, with the
  # rank that failed first. Slurm counts a preempted job whose processes end in time as completed and does not requeue it:
  # this script does.
  job=$(timeout 60 scontrol show job --oneliner "$SLURM_JOB_ID")
  next=$({one_task}"${{python[@]}}" -m launch.slurm.after_job --run "$run" --status "$status" --steps {job.steps} \\
    --restarts {job.restarts} --save-before-end-s {slurm.save_before_end_s} --timeout-s {job.timeout_s:g} --ended "$ended" \\
    {"--spares " if job.spare_nodes else ""}--job "$job")
{_CHOOSE_AGAIN if job.spare_nodes else ""}  [ "$next" = here ] || break
  attempt=$((attempt + 1))
done
""",
        {"requeue": _REQUEUE, "chain": _CHAIN, "none": ""}[continuation],
        'exit "$status"\n',
    ]
    return "".join(parts)


_REQUEUE = """
if [ "$next" = again ]; then
  # A node on which two attempts failed is left out, by a new job; the same job cannot change its nodes.
  if ! { [ -s "$run/logs/exclude" ] && submit; }; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
"""
_CHAIN = """
touch "$logs/ended"
wait "$waiter"
successor=$(cat "$logs/successor" 2>/dev/null)
case $next in
  again)
    if [ -n "$successor" ] && [ -s "$run/logs/exclude" ]; then
      scontrol update JobId="$successor" ExcNodeList="$(cat "$run/logs/exclude")"
    elif [ -z "$successor" ] && ! submit; then
      echo "sbatch does not take the next job (see above); this job goes back into the queue instead" >&2
      scontrol update JobId="$SLURM_JOB_ID" Requeue=1 && scontrol requeue "$SLURM_JOB_ID"
    fi ;;
  finished | stop)
    if [ -n "$successor" ]; then scancel "$successor"; fi ;;
esac
"""

_RENDEZVOUS = """
# Rank 0 listens on the first node, at the address by which Slurm reaches that node: node names need not resolve.
meet_at() {
  local address
  address=$(scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
  export MASTER_ADDR="${address:-$1}"
}
"""
_CHOOSE_AGAIN = """\
  if [ "$next" = here ] && ! choose_nodes; then next=again; fi
"""


def _spares(nodes: int) -> str:
    """The bash function that chooses the nodes of a start among those of a job with spares."""
    return f"""
# Ranks run on the first {nodes} of the job's nodes that are up and not left out; the others are spares.
choose_nodes() {{
  local node excluded left
  excluded=$(cat "$run/logs/exclude" 2> /dev/null)
  # Slurm takes a lost node out of the job, also if it is up again; $SLURM_JOB_NODELIST still names it.
  left=$(timeout 60 scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* NodeList=\\([^ ]*\\).*/\\1/p')
  nodes=()
  for node in $(scontrol show hostnames "${{left:-$SLURM_JOB_NODELIST}}"); do
    case ",$excluded," in *,"$node",*) continue ;; esac
    case $(scontrol show node --oneliner "$node" | sed -n 's/.* State=\\([^ ]*\\).*/\\1/p') in
      "" | *DOWN* | *FAIL* | *NOT_RESPONDING* | *\\**) continue ;;
    esac
    nodes+=("$node")
    if [ "${{#nodes[@]}}" = {nodes} ]; then
      meet_at "${{nodes[0]}}"
      echo "nodes of this start: ${{nodes[*]}}" >&2
      return 0
    fi
  done
  echo "only ${{#nodes[@]}} of {nodes} nodes are left: no spare" >&2
  return 1
}}
"""


def _rank_nodes(job: Job) -> str:
    """srun's options for a start on some of the job's nodes."""
    if not job.spare_nodes:
        return ""
    tasks = job.nodes * job.processes
    return f' --nodes={job.nodes} --ntasks={tasks} "--nodelist=$(IFS=,; echo "${{nodes[*]}}")"'


def _submit(job: Job) -> str:
    """The bash function that submits the next job; for a chain, also the background process that calls it once a rank started."""
    text = """
# Submit one more job of this run, but not before a rank has started: a script that fails earlier would submit for ever.
alive() {
  local mark
  for mark in "$logs"*/alive; do if [ -e "$mark" ]; then return 0; fi; done
  return 1
}
submit() {
  local number=""
  local options=(--parsable "$@")
  if [ -s "$run/logs/exclude" ]; then options+=("--exclude=$(cat "$run/logs/exclude")"); fi
  alive || return 1
  if number=$(timeout 60 sbatch "${options[@]}" "$run/logs/job.sh" 2> "$logs.sbatch"); then
    rm -f "$logs.sbatch" "$run/logs/no-successor"
    echo "${number%%;*}" >> "$run/logs/jobs"
    echo "${number%%;*}"
  else
    cat "$logs.sbatch" >&2
    mv "$logs.sbatch" "$run/logs/no-successor"
    return 1
  fi
}
"""
    if job.slurm.continuation != "chain":
        return text
    return (
        text
        + """
# The next job of the chain is submitted as soon as a rank has started, so that the chain survives the loss of this node;
# see the end of the script.
mkdir -p "$logs"
{
  until alive || [ -e "$logs/ended" ]; do sleep 1; done
  submit --dependency=afterany:"$SLURM_JOB_ID" > "$logs/successor"
} &
waiter=$!
"""
    )


def preparation_script(job: Preparation) -> str:
    """The sbatch script of an array job that prepares data, one share for each task. Raises like `training_script`."""
    options = [
        f"--job-name={job.name}",
        f"--array=0-{job.tasks - 1}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={job.cpus}",
        *_common_options(job.slurm, " ".join(map(shlex.quote, without_gpus(job.slurm.options)))),
        "--requeue",
        "--open-mode=append",
        f"--chdir={job.directory}",
        f"--output={_escape_patterns(job.folder)}/logs/%A_%a.log",
    ]
    command = ["-m", FRONT, "prepare", *job.words]
    return "".join(
        [
            f"""\
#!/bin/bash
# Data {one_line(job.folder)}, written by `stratum launch slurm --prepare`: {job.tasks} tasks share the work. A restarted
# task keeps its finished shards; the last task to finish writes the manifest.
""",
            "".join(f"#SBATCH {option(word)}\n" for word in options),
            _setup(job.slurm),
            _pythonpath_line(job.code),
            _python(job),
            "\n",
            _credentials(job.words, f"{job.folder}/logs"),
            f'\n{_one_task(job.container)}"${{python[@]}}" {_folded(command)} \\\n',
            f'    --task "$SLURM_ARRAY_TASK_ID/{job.tasks}"\n',
        ]
    )


def credentials_text(words: Sequence[str]) -> str:
    """The content of `CREDENTIALS`: the words that contain a password or a token; "" if there are none."""
    found = _with_credentials(words)
    return f"credentials=({shlex.join(found)})\n" if found else ""


def _with_credentials(words: Sequence[str]) -> list[str]:
    return [word for word in dict.fromkeys(words) if without_credentials(word) != word]


def _credentials(words: Sequence[str], folder: str) -> str:
    if not _with_credentials(words):
        return ""
    return f". {quoted(f'{folder}/{CREDENTIALS}')}  # words with a password or a token; only you can read this file\n"


def _environment_check(job: Job) -> str:
    """A warning in the job's log if packages have changed since submission."""
    return f'{_one_task(job.container)}"${{python[@]}}" -m launch.slurm.environment\n' if job.code else ""


def without_gpus(options: str) -> list[str]:
    """sbatch options for a job on CPUs: `options` without those that request GPUs, whole nodes or all memory of a node."""
    words = shlex.split(options)
    kept, skip = [], False
    for position, word in enumerate(words):
        if skip:
            skip = False
            continue
        name, sign, value = word.partition("=")
        if not sign and position + 1 < len(words) and not words[position + 1].startswith("-"):
            value = words[position + 1]
        asks = name.startswith(("--gpu", "--exclusive", "--ntasks", "--cpus-per-gpu", "--mem-per-gpu")) or name == "-G"
        asks = asks or (name in ("--gres", "--tres-per-task", "--tres-per-job") and "gpu" in value)
        asks = asks or (name == "--mem" and value == "0")
        if asks:
            skip = not sign and bool(value) and name != "--exclusive"
        else:
            kept.append(word)
    return kept


def _common_options(slurm: SlurmConfig, options: str) -> list[str]:
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    hours, minutes = divmod(slurm.time_limit_minutes, 60)
    return [
        *[f"--{name}={value}" for name, value in named.items() if value is not None],
        *([f"--mem={slurm.memory_gib}G"] if slurm.memory_gib else []),
        *shlex.split(options),
        f"--time={hours:02}:{minutes:02}:00",
    ]


def _escape_patterns(folder: str) -> str:
    """A folder for use in Slurm's file names, in which % starts a pattern."""
    return folder.replace("%", "%%")


def _setup(slurm: SlurmConfig) -> str:
    """The user's setup lines. They run without `set -u`, because scripts they source (conda, bashrc) read unset variables."""
    lines = f"{slurm.setup.strip()}\n" if slurm.setup.strip() else ""
    return f"\n{lines}set +e -uo pipefail\n"


def _pythonpath_line(folder: str) -> str:
    """The line that makes Python use the copy of the packages: a requeued job must not run later edits of the working tree."""
    if not folder:
        return ""
    return f"export PYTHONPATH={quoted(folder)}${{PYTHONPATH:+:$PYTHONPATH}}\n"


def _rank_cpus(slurm: SlurmConfig) -> str:
    """The srun option for CPUs: since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch."""
    return f" --cpus-per-task={slurm.cpus_per_process}" if slurm.cpus_per_process else ""


def _with_threads(job: Job) -> list[str]:
    """The words, and run.threads=N if the recipe sets the number of CPUs that Slurm binds each process to."""
    has_own = any(word.lstrip("+").startswith("run.threads=") for word in job.words)
    if has_own or not job.slurm.cpus_per_process:
        return list(job.words)
    return [*job.words, f"run.threads={job.slurm.cpus_per_process}"]


def _one_task(container: ContainerConfig) -> str:
    """Prefix of a command that starts one process outside the ranks' step: with pyxis, only srun can enter the container."""
    return "srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 " if container.kind == "pyxis" else ""


def _python(job: Job | Preparation) -> str:
    """Lines that set `python`: the words that start Python, inside the container if the recipe has one.

    Python does not search the working directory (launch.children). In a container PYTHONPATH names the copy of our packages, or
    the checkout that the job was submitted from.
    """
    container, directory = job.container, job.directory
    folders = list(dict.fromkeys(filter(None, (directory, None if job.code else job.checkout, *job.mounts))))
    if container.kind != "none":
        for folder in folders:
            if "," in folder or ":" in folder:
                raise RecipeError(f"{folder} cannot be mounted in a container: `,` and `:` separate mounts. Rename it.")
    mounts = ",".join([*(f"{folder}:{folder}" for folder in folders), *filter(None, [container.mounts])])
    has_gpus = isinstance(job, Job) and job.gpus_per_node > 0
    inside = shlex.join([container.python, *PYTHON_FLAGS])
    packages = job.code or job.checkout
    if packages:
        inside = f'env "PYTHONPATH="{quoted(packages)}"${{PYTHONPATH:+:$PYTHONPATH}}" {inside}'
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
    """Words of a command, quoted, in lines of about 110 characters. Words with credentials become entries of `credentials`."""
    secret = _with_credentials(words)
    lines, line = [], ""
    for word in (f'"${{credentials[{secret.index(word)}]}}"' if word in secret else quoted(word) for word in words):
        if line and len(line) + len(word) > 110:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return " \\\n    ".join([*lines, line])
