"""The text of Slurm scripts, compared with tests/launch/slurm/scripts/: a change there is visible to users in their jobs.

After an intended change, update the file: the failing test prints the new text.
"""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_jobs import CPU

from launch.children import stratum
from launch.compose import compose
from launch.runs import RunFolder
from launch.slurm.command import _write_script, outside_folders, training_job
from launch.slurm.environment import ENVIRONMENT, changes, check, environment_text
from launch.slurm.job_script import (
    CREDENTIALS,
    Preparation,
    preparation_script,
    training_script,
    without_gpus,
)
from launch.slurm.job_times import advice
from launch.slurm.snapshot import take_snapshot
from recipes.schema.errors import RecipeError
from recipes.schema.launch import ContainerConfig, SlurmConfig
from recipes.schema.launch_rules import script_problems
from recipes.schema.recipe import Recipe

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = Path(__file__).parent / "scripts"
NO_SLURM = {**os.environ, "PATH": "/nowhere"}
GPU = replace(
    CPU,
    name="big",
    folder="runs/big",
    words=[
        "-cn",
        "nemotron_nano_12b_v2",
        "run.name=big",
        "launch=slurm_gpu",
        "parallel.tensor=8",
        'run.folder="my runs"',
    ],
    nodes=16,
    processes=8,
    gpus_per_node=8,
    steps=10_000,
    environment={"PYTHONUNBUFFERED": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "WARN"},
    slurm=SlurmConfig(
        partition="h100",
        account="lab",
        time_limit_minutes=24 * 60,
        save_before_end_s=900,
        options="--exclusive --mem=0",
        setup="module load cuda",
        continuation="chain",
        cpus_per_process=12,
    ),
)
PYXIS = ContainerConfig(kind="pyxis", image="registry#stratum:latest", mounts="/data:/data")
APPTAINER = ContainerConfig(kind="apptainer", image="stratum.sif", mounts="/data:/data")
PREPARE = Preparation(
    name="prepare-web",
    folder="data/web",
    directory="/scratch/you/stratum",
    words=["-cn", "web"],
    python="/scratch/you/stratum/.venv/bin/python",
    tasks=64,
    cpus=8,
    slurm=SlurmConfig(partition="cpu"),
    container=ContainerConfig(),
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cpu.sh", training_script(CPU)),
        ("spares.sh", training_script(replace(CPU, spare_nodes=1))),
        ("gpu.sh", training_script(GPU)),
        ("pyxis.sh", training_script(replace(GPU, container=PYXIS))),
        ("apptainer.sh", training_script(replace(GPU, container=APPTAINER, checkout="/opt/stratum"))),
        ("prepare.sh", preparation_script(PREPARE)),
    ],
)
def test_scripts_are_unchanged_and_valid_bash(name: str, text: str) -> None:
    assert (SCRIPTS / name).read_text() == text, f"if this is wanted, write it to {SCRIPTS / name}:\n{text}"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_passwords_and_tokens_are_not_in_the_script_but_reach_the_trainer(tmp_path: Path) -> None:
    secret = ["data.folder=https://me:pw9@host/set?token=abc", "data.sources.x.path='s3://b/f?sig=it`s'"]
    words = ["-cn", "smoke", *secret, "run.steps=3"]
    job = replace(CPU, words=words, python="python", folder=str(tmp_path / "a run"))
    script = training_script(job)
    assert not any(word in script for word in ("pw9", "abc", "it`s")) and "${credentials[1]}" in script
    path = tmp_path / "a run" / "logs" / "job.sh"
    path.parent.mkdir(parents=True)
    assert _write_script(path, script, words).read_text() == script
    assert stat.S_IMODE((path.parent / CREDENTIALS).stat().st_mode) == 0o600
    result = run_with_stand_ins(script, tmp_path)
    assert result.stdout.splitlines()[-len(words) :] == words, result
    _write_script(path, script, ["-cn", "smoke"])
    assert not (path.parent / CREDENTIALS).exists(), "no old password is left"
    prepare = preparation_script(replace(PREPARE, words=words))
    assert "pw9" not in prepare and f". data/web/logs/{CREDENTIALS}" in prepare


def test_a_job_says_which_packages_changed_since_submission(tmp_path: Path) -> None:
    before = "python==3.12.3\nnumpy==2.3.0\ntorch==2.14.1\nold==1.0\n"
    now = "python==3.12.3\nnumpy==2.3.0\ntorch==2.15.0\nnew==0.1\n"
    assert changes(before, now) == ["new 0.1 added", "old 1.0 removed", "torch 2.14.1 -> 2.15.0"]
    path = tmp_path / ENVIRONMENT
    assert check(path) == "" and path.read_text() == environment_text(), "in a container the first job writes the list"
    assert check(path) == ""
    path.write_text(re.sub(r"^torch==.*$", "torch==1.0", environment_text(), flags=re.MULTILINE))
    (line,) = check(path).splitlines()
    assert line.startswith("warning: packages changed since this run was submitted") and "torch 1.0 -> 2." in line
    path.unlink()
    os.mkfifo(path)
    assert "is unknown" in check(path)


@pytest.mark.parametrize("kind", ["none", "pyxis", "apptainer"])
def test_every_word_reaches_the_trainer_unchanged(kind: str, tmp_path: Path) -> None:
    """The script, run by bash with stand-ins for Slurm's commands that print their words, one on each line."""
    words = ["-cn", "smoke", 'launch.environment="A=1 B=2"', "data.sources.x.path=it's $HOME/*.txt", "a=[1,2]"]
    container = ContainerConfig(kind=kind, image="image") if kind != "none" else ContainerConfig()  # type: ignore[arg-type]
    job = replace(
        CPU, words=words, container=container, python="python", folder=str(tmp_path / "a run"), checkout="/our code"
    )
    result = run_with_stand_ins(training_script(job), tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and result.stderr == "", result
    assert lines[0] == "10.0.0.7 20408"
    assert lines[-len(words) :] == words
    assert lines[-len(words) - 4 : -len(words)] == ["-P", "-m", "launch.local.rank", "train"]


def run_with_stand_ins(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A training script, run by bash with stand-ins for Slurm's commands and Python."""
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    (tmp_path / "a run" / "logs").mkdir(parents=True, exist_ok=True)
    line = 'case "$*" in *launch.slurm.environment*) ;; *) printf "%s\\n" "$@" ;; esac'
    programs = {name: line for name in ("srun", "apptainer", "python")}
    programs["scontrol"] = "echo 'NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n1'"
    for name, line in programs.items():
        (commands / name).write_text(f"#!/bin/bash\n{line}\n")
        (commands / name).chmod(0o755)
    script = script.replace('  "${ranks[@]}"', '  echo "$MASTER_ADDR $MASTER_PORT"; "${ranks[@]}"')
    known = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "HOME": "/nowhere",
        "PATH": f"{commands}:/usr/bin:/bin",
    }
    return subprocess.run(
        ["bash"], input=script, env={**known, **environment}, capture_output=True, text=True, check=False
    )


def test_a_requeued_job_gets_another_port(tmp_path: Path) -> None:
    """Processes that are still ending may hold the old port."""
    script = training_script(replace(CPU, python="python", folder=str(tmp_path / "a run")))
    ports = [
        run_with_stand_ins(script, tmp_path, SLURM_RESTART_COUNT=str(n)).stdout.splitlines()[0].split()[1]
        for n in range(3)
    ]
    assert ports == ["20408", "24409", "28410"]


@pytest.mark.parametrize("continuation", ["requeue", "chain", "none"])
def test_starts_without_progress_are_limited_in_every_mode(continuation: str, tmp_path: Path) -> None:
    """launch.restarts=3: four starts; a new checkpoint between them resets the count. It depends on nothing after the start."""
    slurm = replace(CPU.slurm, continuation=continuation)  # type: ignore[arg-type]
    script = training_script(replace(CPU, slurm=slurm, python="python", folder=str(tmp_path / "a run")))
    statuses = [run_with_stand_ins(script, tmp_path).returncode for _ in range(5)]
    assert statuses == [0, 0, 0, 0, 1]
    result = run_with_stand_ins(script, tmp_path)
    assert "stop: 4 starts in a row brought no new checkpoint (launch.restarts=3)" in result.stderr
    checkpoints = tmp_path / "a run" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "latest").write_text("step_00000010")
    assert run_with_stand_ins(script, tmp_path).returncode == 0


HOSTILE = 'it\'s a "run" $(id) `id` ; # %j \\ *'


def test_names_and_options_with_blanks_and_quotes_keep_them(tmp_path: Path) -> None:
    """How sbatch and bash read the lines: shlex reads #SBATCH lines as sbatch does (test_slurm_continuation.py submits such a
    job to a real one)."""
    slurm = SlurmConfig(options="--comment='my job' --exclusive")
    script = training_script(replace(CPU, name=HOSTILE, folder=f"runs/{HOSTILE}", slurm=slurm))
    options = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert f"--job-name={HOSTILE}" in options and "--comment=my job" in options
    assert f"--output=runs/{HOSTILE.replace('%', '%%')}/logs/slurm-%j.log" in options
    shown = subprocess.run(
        ["bash"],
        input="\n".join(line for line in script.splitlines() if line.startswith("run=")) + '\nprintf %s "$run"',
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout == f"runs/{HOSTILE}"


def test_a_line_break_in_a_name_is_an_error_and_no_second_line() -> None:
    with pytest.raises(RecipeError, match="line break"):
        training_script(replace(CPU, name="a\ntouch /tmp/x"))
    script = training_script(replace(CPU, words=["-cn", "smoke", "run.name=a\nb"]))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "'run.name=a\nb'" in script


def test_preparing_data_asks_for_no_gpus() -> None:
    options = "--exclusive --mem=0 --constraint=ib --gres=gpu:8 --gpus-per-node 8 -G 4 --gres=tmp:1 --comment='a b'"
    assert without_gpus(options) == ["--constraint=ib", "--gres=tmp:1", "--comment=a b"]
    script = preparation_script(replace(PREPARE, slurm=SlurmConfig(options="--exclusive --mem=0")))
    assert "exclusive" not in script and "--mem" not in script and "gpu" not in script.lower()


def test_folders_outside_the_working_folder_are_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links in the working folder may lead outside. Syntax: `--container-mounts=SRC:DST,...` (pyxis), `--bind src:dest,...`."""
    work, elsewhere = tmp_path / "work", tmp_path / "scratch"
    (elsewhere / "runs").mkdir(parents=True)
    (work / "inside").mkdir(parents=True)
    (work / "runs").symlink_to(elsewhere / "runs")
    monkeypatch.chdir(work)
    found = outside_folders("runs/new", "inside/data", elsewhere / "data" / "not" / "yet", "s3://b/x", "hf:x", None)
    assert found == [str(elsewhere)], "the nearest existing folder; what is inside it needs no second mount"
    for container, text in ((PYXIS, "--container-mounts="), (APPTAINER, "--bind ")):
        script = training_script(replace(GPU, container=container, mounts=["/lustre/data"]))
        assert f"{text}/scratch/you/stratum:/scratch/you/stratum,/lustre/data:/lustre/data,/data:/data" in script
        with pytest.raises(RecipeError, match="cannot be mounted"):
            training_script(replace(GPU, container=container, mounts=["/a:b"]))


def test_a_requeued_job_runs_the_code_it_was_submitted_with(tmp_path: Path) -> None:
    """Only the copy is imported, not the working folder; the user's own recipes are copied too."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.yaml").write_text("x: 1\n")
    code = take_snapshot(
        tmp_path / "logs",
        ["--config-dir=" + str(mine), "-cn", "a", "--config-dir", str(mine)],
        with_environment=True,
    )
    assert code.words == [f"--config-dir={code.folder}/config-0", "-cn", "a", "--config-dir", f"{code.folder}/config-1"]
    (mine / "a.yaml").write_text("x: 2\n")
    assert (code.folder / "config-0" / "a.yaml").read_text() == "x: 1\n"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("raise SystemExit('the working tree was imported')\n")
    program = "import launch.slurm.after_job, recipes; print(launch.__file__, recipes.__file__)"
    python = training_script(replace(CPU, python=sys.executable, code=str(code.folder)))
    (line,) = [line for line in python.splitlines() if line.startswith("python=(")]
    result = subprocess.run(
        ["bash", "-c", f'{line}; export PYTHONPATH={code.folder}; "${{python[@]}}" -c "$1"', "_", program],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.split() == [f"{code.folder}/launch/__init__.py", f"{code.folder}/recipes/__init__.py"], result
    assert "torch==" in (code.folder / "environment.txt").read_text()


def test_a_run_that_its_plan_refuses_is_not_submitted(tmp_path: Path) -> None:
    words = [
        "-cn",
        "nemotron_h_56b",
        "launch=slurm_gpu",
        "launch.nodes=1",
        "launch.gpus_per_node=4",
        "parallel.tensor=4",
        "parallel.pipeline=1",
    ]
    command = stratum("launch", "slurm", *words, f"run.folder={tmp_path}")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "on 4 h100 GPUs this run would fail:" in result.stderr, result.stderr
    assert "GiB" in result.stderr and "--force submits anyway" in result.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"
    forced = subprocess.run([*command, "--force"], cwd=ROOT, capture_output=True, text=True, check=False, env=NO_SLURM)
    assert "warning: on 4 h100 GPUs this run would fail (--force)" in forced.stderr
    assert forced.returncode == 2 and "is not installed on this machine" in forced.stderr


def test_megatrons_launch_order_is_kept_for_every_way_to_request_gpus() -> None:
    recipe = read("-cn", "smoke", "launch.slurm.options='--gres=gpu:2'", "parallel.tensor=2", "parallel.sequence=true")
    assert training_job(recipe, []).environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def read(*words: str) -> Recipe:
    recipe = compose(words, program="test")
    assert isinstance(recipe, Recipe)
    return recipe


def advise(tmp_path: Path, *words: str) -> str:
    command = stratum("launch", "slurm", *words, f"run.folder={tmp_path}", "--dry-run")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.startswith("#!/bin/bash"), result.stderr
    return result.stderr


def test_a_dry_run_says_how_many_jobs_the_run_will_take(tmp_path: Path) -> None:
    """By the plan: seconds left / the time for steps in a job of 240 minutes."""
    words = ("-cn", "nemotron_nano_12b_v2", "launch=slurm_gpu", "launch.nodes=92", "parallel.pipeline=2")
    said = advise(tmp_path, *words)
    plan = subprocess.run(stratum("plan", *words, "--json"), cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(plan.stdout)
    jobs = found["step_time_s"] * found["steps"] / (240 * 60 - 300 - 300)
    (told,) = re.findall(r"about ([\d,]+) jobs of 240 minutes", said)
    assert abs(int(told.replace(",", "")) - jobs) <= 1
    short = advise(tmp_path, *words, "launch.slurm.save_before_end_s=2")
    assert "is less than twice a step and a save" in short and "Use launch.slurm.save_before_end_s=60" in short
    assert "this run would fail" in advise(tmp_path, *words, "--device", "a10g")


def test_a_dry_run_goes_by_the_runs_own_record(tmp_path: Path) -> None:
    """Steps 10 s apart, 1,000 of them left: 2.8 hours, one job; CPUs without a record are not predicted."""
    assert "on CPUs are not predicted" in advise(tmp_path, "-cn", "smoke", "run.name=new")
    run = tmp_path / "old"
    (run / "checkpoints" / "step_00000200").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step_00000200")
    (run / "recipe.yaml").write_text("run: {steps: 1200}\n")
    lines = [
        {"kind": "step", "step": step, "loss": 1.0, "tokens_per_s": 1.0, "time": 10.0 * step, "step_s": 10.0}
        for step in range(1, 201)
    ] + [{"kind": "phase", "name": "saving", "seconds": 200.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = advice(read("-cn", "smoke", "run.name=old", "run.steps=1200"), RunFolder(run), world=1, device="h100")
    assert "By the run's own record: 10 s a step, 1,000 steps left: 2.8 h. One job is enough" in said
    assert "launch.slurm.time_limit_minutes=220" in said, "3.5 hours, 300 s to start, 300 s to save"
    assert "twice a step and a save (420 s). Use launch.slurm.save_before_end_s=420" in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launch.slurm.options='--comment=\"x'", "launch.slurm.options='--comment=\"x': No closing quotation"),
        ("launch.slurm.setup='export HF_TOKEN=hf_abc'", "launch.slurm.setup gives a secret (HF_TOKEN)"),
        ("launch.slurm.setup='export PROXY=https://me:pw@host'", "launch.slurm.setup gives a secret (PROXY)"),
    ],
)
def test_what_no_script_can_contain_is_refused_before_it_is_written(word: str, said: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        training_job(read("-cn", "smoke", word), [])
    assert said in str(refusal.value) and "hf_abc" not in str(refusal.value) and "pw" not in str(refusal.value)
    for fine in ("module load cuda", "export HF_TOKEN=$(cat ~/.token)", 'export X_KEY="$OTHER"'):
        recipe = read("-cn", "smoke")
        assert not script_problems(replace(recipe, launch=replace(recipe.launch, slurm=SlurmConfig(setup=fine))))


def test_spares_with_requeue_are_refused() -> None:
    """Slurm ends such a job as FAILED when its first node is lost (test_slurm_spares.py)."""
    with pytest.raises(RecipeError, match=r"Use launch\.slurm\.continuation=chain"):
        training_job(read("-cn", "smoke", "launch.slurm.spare_nodes=1"), [])
    for continuation in ("chain", "none"):
        words = ("launch.slurm.spare_nodes=1", f"launch.slurm.continuation={continuation}")
        assert training_job(read("-cn", "smoke", *words), []).spare_nodes == 1
