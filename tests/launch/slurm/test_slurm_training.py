"""Real training over two nodes of a real Slurm: stopped by a signal, or by its time limit, requeued, resumed, finished.

The end is compared bit for bit with a run of `stratum launch local` that nothing disturbed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_rig import slurm_rig, wait_for
from texts import VOCAB, overrides_of, prepared_in, write_texts

from launch.queue import look_up, send_signal
from launch.runs import RunFolder
from launch.slurm.jobs import active_jobs, job_numbers
from recipes.schema.run_folder import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slurm
RECIPE = [
    "-cn", "smoke", "model.pattern=M*-", "model.hidden=32", "model.ffn=64", "model.heads=2", "model.kv_heads=2",
    "model.head_dim=16", "model.mamba_heads=4", "model.mamba_head_dim=8", "model.mamba_state=8", f"model.vocab={VOCAB}",
    "precision.scaling=none", "model.mamba_chunk=8",
    "run.global_rows=4", "run.microbatch_rows=2", "run.threads=1", "schedule.warmup=2",
    "schedule.decay=4", "evaluate.every_steps=0", "evaluate.rows_per_source=2", "telemetry.log_every_steps=1",
    "telemetry.tensorboard=false", "launch.timeout_s=120", "precision=fp32",
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A tiny recipe over this test's own data."""
    config = prepared_in(write_texts(tmp_path))
    return [*RECIPE, *overrides_of(config), f"run.folder={tmp_path}"]


def launch(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.stratum", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(child: subprocess.Popen[str], timeout_s: float = 300) -> str:
    output, _ = child.communicate(timeout=timeout_s)
    assert child.returncode == 0, output
    return output


def record(run: RunFolder) -> tuple[dict[int, tuple[float, float]], dict[str, float]]:
    """The last loss and gradient norm of each step, and the last held-out scores: all exact."""
    lines = read_metrics(run.path / METRICS)
    steps = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"}
    return steps, [line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"][-1]


def compare(disturbed: RunFolder, whole: RunFolder, *, steps: int) -> None:
    assert sorted(record(whole)[0]) == list(range(1, steps + 1))
    assert record(disturbed) == record(whole), "both ends must be equal to the last bit"


def submit(words: list[str], name: str, *more: str) -> RunFolder:
    output = finish(
        launch("launch", "slurm", *words, f"run.name={name}", "launch.nodes=2", "launch.processes=1", *more)
    )
    assert output.startswith("Submitted job "), output
    return RunFolder(Path(words[-1].partition("=")[2]) / name)


def test_two_nodes_train_stop_at_a_signal_are_requeued_and_end_like_an_undisturbed_run(
    words: list[str], tmp_path: Path
) -> None:
    more = ("run.steps=60", "checkpoint.every_steps=20")
    with slurm_rig(2):
        run = submit(words, "disturbed", *more, "launch.slurm.time_limit_minutes=30")
        whole = launch("launch", "local", *words, "run.name=whole", "--nproc", "2", *more)
        (number,) = job_numbers(run)
        wait_for(lambda: (progress := run.progress()) is not None and progress.step >= 3)
        send_signal(number, "USR1")  # what Slurm itself sends before the time limit
        wait_for(lambda: not active_jobs(run))
        (job,) = look_up([number])
    local = finish(whole)
    assert "launch: 2 processes (TP1 PP1 DP2), logs in" in local and "Finished at step 60" in local
    log = (run.logs / f"slurm-{number}.log").read_text()
    assert (job.state, job.restarts) == ("COMPLETED", 1), log
    assert "again: its time limit was near" in log
    compare(run, RunFolder(tmp_path / "whole"), steps=60)


def test_an_array_job_prepares_the_same_data_also_when_a_task_is_killed(words: list[str], tmp_path: Path) -> None:
    """Three parallel tasks of several shards, one killed and requeued: byte for byte the output of one process."""
    whole, folder = tmp_path / "by_one", tmp_path / "by_tasks"
    words = [word for word in words if not word.startswith("data.folder=")] + ["data.shard_bytes=2500"]
    prepared_in(tmp_path, folder=str(whole), shard_bytes=2500)
    assert len(list(whole.rglob("*.train.bin"))) > 6
    with slurm_rig(2):
        output = finish(launch("launch", "slurm", *words, f"data.folder={folder}", "--prepare", "--tasks", "3"))
        assert "(3 tasks)" in output, output
        (number,) = re.findall(r"array job (\d+)", output)
        task = f"{number}_1"

        def shown(what: str) -> str:
            command = ["scontrol", "show", "job", task]
            text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            return text.partition(f"{what}=")[2].split()[0] if f"{what}=" in text else ""

        wait_for(lambda: shown("JobState") == "RUNNING")
        subprocess.run(["scontrol", "requeue", task], check=True)
        wait_for((folder / "manifest.json").exists, timeout_s=300)
        assert shown("Restarts") == "1"
    for suffix in ("*.bin", "*.idx", "*.origins", "tokenizer.json", "manifest.json"):
        made = {path.relative_to(folder): path.read_bytes() for path in folder.rglob(suffix)}
        assert made and made == {path.relative_to(whole): path.read_bytes() for path in whole.rglob(suffix)}


@pytest.mark.slow
def test_a_job_is_ended_by_its_time_limit_and_the_run_is_finished_by_the_next(words: list[str], tmp_path: Path) -> None:
    """One minute for a job: Slurm sends SIGUSR1 25 to 55 s after the start. Also: tensor parallel over the two nodes.

    How many steps fit into that minute depends on the machine, so the run has no end at first: once it trains again in the
    requeued job it is cancelled, and gets its last step from there.
    """
    more = ("checkpoint.every_steps=500", "parallel.tensor=2", "model.mamba_groups=2", "schedule.decay=0")
    limits = ("launch.slurm.time_limit_minutes=1", "launch.slurm.save_before_end_s=5")
    with slurm_rig(2):
        run = submit(words, "disturbed", *more, *limits, "run.steps=1000000")
        (number,) = job_numbers(run)
        wait_for(lambda: len(run.attempts()) == 2, timeout_s=180)
        saved = run.checkpoint_step()
        wait_for(lambda: (progress := run.progress()) is not None and progress.step > saved)
        finish(launch("cancel", str(run.path)))
        (job,) = look_up([number])
        stopped = run.checkpoint_step()
        steps = f"run.steps={stopped + 20}"
        submit(words, "disturbed", *more, steps, "launch.slurm.time_limit_minutes=30")
        wait_for(lambda: not active_jobs(run))
    assert "TP2" in finish(launch("launch", "local", *words, "run.name=whole", *more, steps))
    log = (run.logs / f"slurm-{number}.log").read_text()
    assert (job.restarts, log.count("again: its time limit was near")) == (1, 1), log
    assert saved % 500 and saved < stopped, "saved because of the time limit, and trained further by the same job"
    compare(run, RunFolder(tmp_path / "whole"), steps=stopped + 20)
