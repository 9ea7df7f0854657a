"""What follows the end of a Slurm job's processes, by srun, the ranks and Slurm. Job lines are from Slurm 22.05."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_jobs import CPU

from launch.local.continuation import Decision
from launch.local.failures import SRUN_LOG, RankFailure, write_failure
from launch.local.rank import set_gloo_interface, set_torchrun_variables
from launch.queue import QueuedJob, read_job
from launch.runs import RunFolder
from launch.slurm import after_job
from launch.slurm.after_job import STOP, decide_after_job, main, reset_state
from launch.slurm.job_script import training_script
from launch.slurm.left_out import EXCLUDE, leave_out, left_out, suspected
from launch.starts import starts_of
from recipes.schema.run_folder import SUSPECTS

RUNNING = "JobId=7 JobState=RUNNING Reason=None Restarts=0 PreemptTime=None EndTime={end} NodeList=n[1-2]"
LOST = "JobId=7 JobState=COMPLETING Reason=NodeDown Restarts=0 EndTime=2026-11-30T03:23:50 NodeList=n1"
CANCELLED = "JobId=7 JobState=COMPLETING Reason=None Restarts=0 EndTime=2026-11-30T03:24:05 NodeList=n[1-2]"
PREEMPTED = "JobId=7 JobState=RUNNING Reason=None PreemptTime=2026-11-30T03:24:05 EndTime=2026-11-30T03:25:05"
KILLED = RankFailure(1, 137, 0.0, "n2")


def in_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "a")
    found.logs.mkdir(parents=True)
    reset_state(found)
    return found


def decide(
    run: RunFolder,
    status: int,
    *,
    failures: list[RankFailure],
    stopped: int | None,
    job: QueuedJob,
    is_lost: bool = False,
) -> Decision:
    return decide_after_job(
        run,
        status,
        failures=failures,
        stopped=stopped,
        job=job,
        steps=100,
        restarts=3,
        is_lost=is_lost or job.reason == "NodeDown",
        blamed=failures[0].host if failures else "",
    )


@pytest.mark.parametrize(
    ("status", "failures", "stopped", "job", "action", "words"),
    [
        (143, [KILLED], None, RUNNING, "again", "it failed with SIGKILL"),  # killed while the others started
        (143, [], None, RUNNING, "again", "it failed with SIGTERM"),  # the same, if srun's message is not known
        (143, [], None, LOST, "again", "a node was lost"),
        (0, [], 143, LOST, "again", "a node was lost"),  # the ranks stopped after srun's SIGTERM
        (143, [], None, CANCELLED, "stop", "stopped by SIGTERM"),
        (0, [], 143, CANCELLED, "stop", "stopped by SIGTERM"),
        (1, [RankFailure(0, 1, 0.0, "n1", "Connection closed")], None, CANCELLED, "stop", "the job was cancelled"),
        (143, [], None, PREEMPTED, "again", "it ended before a new checkpoint"),
        (0, [], 138, RUNNING, "again", "it ended before a new checkpoint"),
        (0, [], 143, RUNNING, "stop", "stopped by SIGTERM"),  # scancel --signal=TERM
        (2, [], None, RUNNING, "stop", "must be changed first"),
        (0, [], None, RUNNING, "again", "it ended before"),
    ],
)
def test_who_asked_a_run_to_stop(
    status: int, failures: list[RankFailure], stopped: int | None, job: str, action: str, words: str, run: RunFolder
) -> None:
    known = read_job(job.format(end=in_time(3600)))
    decision = decide(run, status, failures=failures, stopped=stopped, job=known)
    assert (decision.action, words in decision.reason) == (action, True), decision


def test_launch_cancel_ends_what_would_continue(run: RunFolder) -> None:
    (run.logs / STOP).touch()
    job = read_job(RUNNING.format(end=in_time(3600)))
    decision = decide(run, 0, failures=[], stopped=138, job=job)
    assert decision.action == "stop" and "cancel" in decision.reason


def ask(
    run: RunFolder,
    attempt: str,
    *options: str,
    end_s: float,
    monkeypatch: pytest.MonkeyPatch,
    host: str = "n2",
    error: str = "ValueError: x",
    srun: str = "",
) -> None:
    logs = run.logs / attempt
    logs.mkdir()
    (logs / SRUN_LOG).write_text(srun)
    if error:
        write_failure(logs, RankFailure(1, 1, 1000.0, host, error))
    monkeypatch.setenv("STRATUM_LOGS", str(logs))
    job = RUNNING.format(end=in_time(end_s))
    words = ["--run", str(run.path), "--status", "1", "--steps", "100", "--restarts", "9", "--save-before-end-s", "300"]
    assert main([*words, "--timeout-s", "600", "--ended", "1010", *options, "--job", job]) == 0


def test_a_failed_rank_restarts_in_the_allocation_until_one_node_has_failed_twice(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for attempt, end_s, host in (("a-1", 3600, "n2"), ("a-2", 3600, "n1"), ("a-3", 400, "n3"), ("a-4", 3600, "n2")):
        ask(run, attempt, end_s=end_s, monkeypatch=monkeypatch, host=host)
        said.append(capsys.readouterr().out.strip())
    assert said == ["here", "here", "again", "again"], "400 s are too few: Slurm's only warning may have come"
    assert (run.logs / EXCLUDE).read_text() == "n2\n"
    ends = [line for line in starts_of(run.path) if line["kind"] == "attempt_end"]
    assert [(line["time"], line["failed"], line["status"]) for line in ends] == [(1010.0, 1000.0, 1)] * 4
    reset_state(run)
    assert not (run.logs / EXCLUDE).exists()


def test_a_job_with_spares_continues_without_a_lost_or_failing_node(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its script looks for enough nodes. A rank that only lost its connection says nothing about its own node."""
    lost = "srun: error: Node failure on n2\n"
    for attempt, error, srun in (("a-1", "x", ""), ("a-2", "x", ""), ("a-3", "", lost)):
        ask(run, attempt, "--spares", end_s=3600, monkeypatch=monkeypatch, error=error, srun=srun)
    assert capsys.readouterr().out.split() == ["here"] * 3 and (run.logs / EXCLUDE).read_text() == "n2\n"
    for attempt in ("b-1", "b-2"):
        closed = "RuntimeError: Connection closed by peer"
        ask(run, attempt, end_s=3600, monkeypatch=monkeypatch, host="n1", error=closed, srun=lost)
    assert (run.logs / EXCLUDE).read_text() == "n2\n", "n1 is not at fault"


def test_suspects_and_the_users_own_nodes_stay_left_out(run: RunFolder) -> None:
    found = [("state", ["n4"]), ("transient", ["n5"]), ("transient", ["n6"]), ("transient", ["n5"]), ("state", ["a,b"])]
    lines = [json.dumps({"kind": kind, "hosts": hosts}) + "\n" for kind, hosts in found]
    (run.path / SUSPECTS).write_text("".join(lines) + '{"kind": "state", "hosts": 3}\n{"broken\n')
    assert suspected(run.path) == ["n4", "n5"], (
        "wrong once, or twice though a repetition was right; no text that is no name"
    )
    reset_state(run, options="--exclusive --exclude=n[7-8,11],n1 -x n9 --comment='a b'")
    leave_out(run.logs, ["n4", "n2"])
    assert left_out(run.logs) == ["n1", "n2", "n4", "n5", "n9", "n[7-8,11]"]


def test_the_script_leaves_out_a_node_that_failed_twice(tmp_path: Path) -> None:
    """The bash function of the scripts, with an sbatch that records its words."""
    run, commands = tmp_path / "a run", tmp_path / "bin"
    (run / "logs" / "slurm-7-0").mkdir(parents=True)
    (run / "logs" / EXCLUDE).write_text("n2,n5\n")
    commands.mkdir()
    (commands / "sbatch").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{tmp_path}/words"; echo 12\n')
    (commands / "sbatch").chmod(0o755)
    script = training_script(replace(CPU, folder=str(run)))
    begin, end = script.index("run="), script.index("# Rank 0 listens")
    text = script[begin:end] + 'submit || echo refused\ntouch "$logs/alive"\nsubmit\n'
    environment = {"SLURM_JOB_ID": "7", "PATH": f"{commands}:/usr/bin:/bin"}
    result = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "refused\n12\n", "no submission before a rank has started"
    assert (tmp_path / "words").read_text().splitlines() == ["--parsable", "--exclude=n2,n5", f"{run}/logs/job.sh"]
    assert (run / "logs" / "jobs").read_text() == "12\n"


def test_gloo_gets_the_interface_that_leads_to_rank_0() -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    set_gloo_interface(environment)
    if sys.platform == "linux":
        assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    own = {**environment, "GLOO_SOCKET_IFNAME": "ib0"}
    set_gloo_interface(own)
    assert own["GLOO_SOCKET_IFNAME"] == "ib0"


def test_ranks_of_one_node_meet_on_loopback() -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "10.0.0.7"}
    for nodes, address in (("1", "127.0.0.1"), ("2", "10.0.0.7")):
        environment = {**slurm, "SLURM_NNODES": nodes}
        assert set_torchrun_variables(environment) and environment["MASTER_ADDR"] == address


def test_the_state_of_an_older_version_is_not_an_error(run: RunFolder) -> None:
    (run.logs / after_job._STATE).write_text(json.dumps({"failures": 1, "checkpoint": None}))
    assert after_job._read(run).failures == 1
