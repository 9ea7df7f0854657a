"""Spare nodes and booked time on a real Slurm of four nodes: a failing node and a lost node are replaced in the same job."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_jobs import CPU
from slurm_rig import slurm_rig, wait_for

from launch.queue import look_up
from launch.runs import RunFolder
from launch.slurm.command import submit_run
from launch.slurm.job_script import Job
from launch.slurm.jobs import active_jobs, job_numbers
from launch.slurm.left_out import left_out
from launch.starts import starts_of
from launch.time_spent import QUEUE, time_spent, totals
from recipes.schema.launch import SlurmConfig
from recipes.schema.run_folder import METRICS, SUSPECTS, read_metrics

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slurm
JOB = replace(
    CPU,
    directory=str(ROOT),
    python=sys.executable,
    steps=40,
    restarts=1,
    environment={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONUNBUFFERED": "1"},
    slurm=SlurmConfig(time_limit_minutes=10, save_before_end_s=60, continuation="none"),
    module="simulated_train",
    spare_nodes=1,
    code="",
)


def begin(root: Path, name: str, *words: str, job: Job = JOB) -> RunFolder:
    run = RunFolder(root / name)
    words = (str(run.path), "--steps", "40", "--step-s", "0.05", *words)
    submit_run(run, replace(job, name=name, folder=str(run.path), words=words), keep_code=False)
    return run


def lose(node: str, run: RunFolder) -> None:
    """Take a node down while the run waits at step 20, and wait for the run's end. (The node comes back by itself.)"""
    wait_for(lambda: run.step() >= 20)
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"], check=True)
    wait_for(lambda: not active_jobs(run), timeout_s=200)


def nodes_of_starts(run: RunFolder) -> list[list[str]]:
    """The nodes of ranks 0 and 1 at each start."""
    return [
        [(folder / f"rank-{rank:05d}.log").read_text().split("\nnode ")[1].split()[0] for rank in (0, 1)]
        for folder in run.attempts()
    ]


def test_a_spare_takes_the_place_of_a_failing_and_of_a_lost_node(tmp_path: Path) -> None:
    """In one job each: rank 1 is killed twice on n2, then runs on n3. Later n3 goes DOWN, and n4 takes its place. n2 is in the
    suspects' file of the second run, so that one never gets it."""
    with slurm_rig(4):
        failing = begin(tmp_path, "failing", "--fail", "1:25:kill:twice")
        wait_for(lambda: not active_jobs(failing), timeout_s=200)
        (job,) = look_up(job_numbers(failing))
        log = (failing.logs / f"slurm-{job.number}.log").read_text()
        assert (job.state, job.restarts) == ("COMPLETED", 0), log
        assert nodes_of_starts(failing) == [["n1", "n2"], ["n1", "n2"], ["n1", "n3"]], log
        assert left_out(failing.logs) == ["n2"] and failing.checkpoint_step() == 40
        starts = starts_of(failing.path)
        assert [line["kind"] for line in starts] == ["submission", *["attempt", "attempt_end"] * 3]
        assert [line["status"] != 0 for line in starts if line["kind"] == "attempt_end"] == [True, True, False]
        spent = totals(time_spent(read_metrics(failing.path / METRICS), starts))
        assert spent[QUEUE] > 0 and "stopped" not in spent, spent
        assert sum(spent.values()) == pytest.approx(starts[-1]["time"] - starts[0]["time"])

        (tmp_path / "losing").mkdir()
        (tmp_path / "losing" / SUSPECTS).write_text('{"kind": "persistent", "hosts": ["n2"]}\n')
        losing = begin(tmp_path, "losing", "--hold", "20", "--patience-s", "5")
        lose("n3", losing)
        (job,) = look_up(job_numbers(losing))
        log = (losing.logs / f"slurm-{job.number}.log").read_text()
        assert (job.state, job.restarts) == ("COMPLETED", 0), log
        assert nodes_of_starts(losing) == [["n1", "n3"], ["n1", "n4"]], log
        assert losing.checkpoint_step() == 40 and "here: a node was lost" in log
        ends = [line for line in starts_of(losing.path) if line["kind"] == "attempt_end"]
        assert len(ends) == 2


def test_a_chain_with_spares_survives_the_loss_of_its_first_node(tmp_path: Path) -> None:
    """The first node has the job's script: Slurm ends the job as FAILED, whatever spares it has, and the next one continues."""
    chain = replace(JOB, slurm=replace(JOB.slurm, continuation="chain"))
    with slurm_rig(4):
        run = begin(tmp_path, "first", "--hold", "20", "--patience-s", "5", job=chain)
        lose("n1", run)
        lost, next_one = look_up(job_numbers(run))[:2]
        log = (run.logs / f"slurm-{next_one.number}.log").read_text()
        assert (lost.state, next_one.state) == ("FAILED", "COMPLETED") and run.checkpoint_step() == 40, log
