"""The text of Slurm scripts, compared with tests/launch/scripts/: a change there is a change users see in their jobs.

A wanted change is made there too: the failing test prints the new text.
"""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.children import stratum
from launch.slurm.job_script import Job, Preparation, preparation_script, training_script
from recipes.schema.launch import ContainerConfig, SlurmConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
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
)
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
        ("gpu.sh", training_script(GPU)),
        ("pyxis.sh", training_script(replace(GPU, container=PYXIS))),
        ("apptainer.sh", training_script(replace(GPU, container=APPTAINER, checkout="/opt/stratum"))),
        ("prepare.sh", preparation_script(PREPARE)),
    ],
)
def test_scripts_are_what_they_were_and_bash_understands_them(name: str, text: str) -> None:
    assert (SCRIPTS / name).read_text() == text, f"if this is wanted, write it to {SCRIPTS / name}:\n{text}"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("kind", ["none", "pyxis", "apptainer"])
def test_every_word_reaches_the_trainer_as_it_was(kind: str, tmp_path: Path) -> None:
    """The script, run by bash with stand-ins for Slurm's commands that print their words, one a line."""
    words = ["-cn", "smoke", 'launch.environment="A=1 B=2"', "data.sources.x.path=it's $HOME/*.txt", "a=[1,2]"]
    container = ContainerConfig(kind=kind, image="image") if kind != "none" else ContainerConfig()  # type: ignore[arg-type]
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "apptainer", "python"):
        (commands / name).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (commands / name).chmod(0o755)
    (commands / "scontrol").write_text(
        "#!/bin/bash\necho 'NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n1'\n"
    )
    (commands / "scontrol").chmod(0o755)
    job = replace(
        CPU, words=words, container=container, python="python", folder=str(tmp_path / "a run"), checkout="/our code"
    )
    script = training_script(job).replace('"${ranks[@]}"', 'echo "$MASTER_ADDR"; "${ranks[@]}"')
    environment = {
        "PATH": f"{commands}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "HOME": "/nowhere",
    }
    result = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and result.stderr == ""
    assert lines[0] == "10.0.0.7"
    assert lines[-len(words) :] == words
    assert lines[-len(words) - 3 : -len(words)] == ["-m", "launch.local.rank", "train"]


def advise(tmp_path: Path, *words: str) -> str:
    command = stratum("launch", "slurm", *words, f"run.folder={tmp_path}", "--dry-run")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.startswith("#!/bin/bash"), result.stderr
    return result.stderr


def test_a_dry_run_says_how_many_jobs_the_run_will_take(tmp_path: Path) -> None:
    """The figures are the plan's: seconds left over what a job of 240 minutes leaves for steps."""
    words = ("-cn", "nemotron_nano_12b_v2", "launch=slurm_gpu", "launch.nodes=92", "parallel.pipeline=2")
    said = advise(tmp_path, *words)
    plan = subprocess.run(stratum("plan", *words, "--json"), cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(plan.stdout)
    jobs = found["step_time_s"] * found["steps"] / (240 * 60 - 300 - 300)
    (told,) = re.findall(r"some ([\d,]+) jobs of 240 minutes", said)
    assert abs(int(told.replace(",", "")) - jobs) <= 1
    short = advise(tmp_path, *words, "launch.slurm.save_before_end_s=2")
    assert "is short of twice a step and a save" in short and "Use launch.slurm.save_before_end_s=60" in short
    assert "this run would fail" in advise(tmp_path, *words, "--device", "a10g")


def test_a_dry_run_goes_by_the_runs_own_record(tmp_path: Path) -> None:
    """Steps 10 s apart, 1,000 of them left: 2.8 hours, one job; CPUs without a record are not predicted."""
    assert "not predicted for CPUs" in advise(tmp_path, "-cn", "smoke", "run.name=new")
    run = tmp_path / "old"
    (run / "checkpoints" / "step_00000200").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step_00000200")
    (run / "recipe.yaml").write_text("run: {steps: 1200}\n")
    lines = [
        {"kind": "step", "step": step, "loss": 1.0, "tokens_per_s": 1.0, "time": 10.0 * step, "step_s": 10.0}
        for step in range(1, 201)
    ] + [{"kind": "phase", "name": "saving", "seconds": 200.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = advise(tmp_path, "-cn", "smoke", "run.name=old", "run.steps=1200")
    assert "By the run's own record: 10 s a step, 1,000 steps left: 2.8 hours. One job does it" in said
    assert "launch.slurm.time_limit_minutes=220" in said, "3.5 hours, 300 s to start, 300 s to save"
    assert "twice a step and a save (420 s). Use launch.slurm.save_before_end_s=420" in said
