"""Job scripts on a real Slurm, over two nodes: requeued and chained continuation, failures, mistakes, cancel, status.

The training is simulated (tests/simulated_train.py); tests/launch/slurm/test_slurm_training.py trains for real. All jobs run
at the same time; the module's fixture waits for all of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from slurm_rig import slurm_rig, wait_for

from launch.queue import SlurmError, cancel, look_up, send_signal
from launch.runs import RunFolder
from launch.slurm.command import submit_run
from launch.slurm.job_script import Job
from launch.slurm.jobs import active_jobs, job_numbers
from recipes.schema.launch import ContainerConfig, SlurmConfig

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slurm
STEPS = 60
JOB = Job(
    name="simulated",
    folder="",
    directory=str(ROOT),
    words=(),
    python=sys.executable,
    nodes=2,
    processes=1,
    gpus_per_node=0,
    steps=STEPS,
    restarts=1,
    environment={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONUNBUFFERED": "1"},
    slurm=SlurmConfig(time_limit_minutes=10, save_before_end_s=60, options="--nodelist=n[1-2]"),
    container=ContainerConfig(),
    module="simulated_train",
)
CHAIN = replace(JOB.slurm, continuation="chain")
SPARE = replace(JOB.slurm, partition="spare", options="--nodelist=n[3-4]")
HELD = ("--hold", "20", "--patience-s", "60")
"""Runs until it gets a signal, also on a slow machine."""
URGENT = ("--partition=urgent", "--nodelist=n3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


UNSET = 'if [ -z "$BASHRCSOURCED" ]; then :; fi'
"""A line of many systems' bashrc: an error under `set -u`."""


def forbid_sbatch(root: Path) -> str:
    """Setup lines of a cluster whose compute nodes may not submit jobs."""
    (root / "bin").mkdir()
    (root / "bin" / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: Access/permission denied' >&2\nexit 1\n")
    (root / "bin" / "sbatch").chmod(0o755)
    return f"export PATH={root}/bin:$PATH"


def node_state(node: str, state: str) -> None:
    subprocess.run(["scontrol", "update", f"nodename={node}", f"state={state}", "reason=test"], check=False)


HOSTILE = "it's a (run) $(id) ; #1 %j"


@dataclass(frozen=True)
class Story:
    """A run that has ended, and observations made while it ran."""

    run: RunFolder
    notes: dict[str, object]

    @property
    def job_log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run.logs.glob("slurm-*.log")))

    def rank_log(self, rank: int) -> str:
        """The logs of all attempts, in order."""
        return "".join((folder / f"rank-{rank:05d}.log").read_text() for folder in self.run.attempts())


def in_a_hostile_folder(root: Path) -> RunFolder:
    """A run whose name and options contain special characters of bash, sbatch and Slurm's file patterns."""
    run = RunFolder(root / HOSTILE)
    slurm = replace(JOB.slurm, options="--nodelist=n[1-2] --comment='my job'")
    words = (str(run.path), "--steps", "20", "--step-s", "0.1")
    submit_run(
        run, replace(JOB, name=HOSTILE, folder=str(run.path), words=words, steps=20, slurm=slurm), keep_code=True
    )
    return run


def begin(root: Path, name: str, *words: str, slurm: SlurmConfig = JOB.slurm, gpus: int = 0) -> RunFolder:
    run = RunFolder(root / name)
    words = (str(run.path), "--steps", str(STEPS), "--step-s", "0.1", *words)
    job = replace(JOB, name=name, folder=str(run.path), words=words, slurm=slurm, gpus_per_node=gpus)
    submit_run(run, job, keep_code=False)
    return run


def reached(run: RunFolder, step: int) -> bool:
    progress = run.progress()
    return progress is not None and progress.step >= step


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "train.stratum", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Story]]:
    """All scenarios of this module, run to their end on one cluster."""
    root = tmp_path_factory.mktemp("runs")
    with slurm_rig(4):
        runs = {
            "requeued": begin(root, "requeued", *HELD, gpus=2),
            "chained": begin(root, "chained", *HELD, slurm=CHAIN),
            "broken": begin(root, "broken", "--fail", "1:25:raise", "--fail", "0:25:peer"),
            "hopeless": begin(root, "hopeless", "--fail", "1:5:kill:always", slurm=CHAIN),
            "mistaken": begin(root, "mistaken", "--fail", "1:5:error"),
            "preempted": begin(root, "preempted", *HELD, slurm=SPARE),
            "killed": begin(root, "killed", "--fail", "1:0:kill", "--start-s", "4"),
            "killed_chain": begin(root, "killed_chain", "--fail", "1:0:kill", "--start-s", "4", slurm=CHAIN),
            "early": begin(root, "early", slurm=replace(CHAIN, setup="exit 7")),
            "unset": begin(root, "unset", slurm=replace(CHAIN, setup=UNSET)),
            "hostile": in_a_hostile_folder(root),
            "cancelled": begin(root, "cancelled", *HELD, slurm=CHAIN),
            "ended": begin(root, "ended", *HELD),
            "forbidden": begin(root, "forbidden", *HELD, slurm=replace(CHAIN, setup=forbid_sbatch(root))),
        }
        notes: dict[str, dict[str, object]] = {name: {} for name in runs}
        wait_for(lambda: reached(runs["preempted"], 13))
        subprocess.run(["sbatch", *URGENT], check=True, capture_output=True)
        with pytest.raises(SlurmError) as second:
            submit_run(runs["requeued"], replace(JOB, folder=str(runs["requeued"].path)), keep_code=False)
        notes["requeued"]["second"] = str(second.value)
        for name in ("requeued", "chained", "forbidden"):
            wait_for(lambda name=name: reached(runs[name], 13))
            notes[name]["status"] = launch("status", str(runs[name].path), "--json")
            send_signal(job_numbers(runs[name])[0], "USR1")
        run, ended = runs["cancelled"], runs["ended"]
        wait_for(lambda: reached(run, 13) and reached(ended, 13))
        cancel(job_numbers(ended)[0])
        notes["cancelled"]["cancel"] = launch("cancel", str(run.path))
        notes["cancelled"]["checkpoint"] = run.checkpoint_step()
        notes["cancelled"]["status"] = launch("status", str(run.path))
        begin(root, "cancelled")
        wait_for(lambda: not active_jobs(runs["preempted"]))  # its nodes are free: one can be lost
        down = runs["down"] = begin(root, "down", *HELD, slurm=replace(CHAIN, options="--nodelist=n[3-4]"))
        notes["down"] = {}
        wait_for(lambda: reached(down, 13) and len(job_numbers(down)) == 2)
        node_state("n4", "down")
        wait_for(lambda: not look_up(job_numbers(down)[:1])[0].is_active)
        node_state("n4", "resume")
        for run in runs.values():
            wait_for(lambda run=run: not active_jobs(run))
        for name, run in runs.items():
            notes[name]["jobs"] = look_up(job_numbers(run))
        number = str(job_numbers(runs["hostile"])[0])
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", number], capture_output=True, text=True, check=True
        )
        notes["hostile"]["text"] = shown.stdout
        yield {name: Story(run, notes[name]) for name, run in runs.items()}


def test_time_is_up_and_the_same_job_continues_to_the_last_step(stories: dict[str, Story]) -> None:
    story = stories["requeued"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    assert story.run.checkpoint_step() == STEPS
    assert (
        "again: its time limit was near" in story.job_log
        and "finished: finished; newest checkpoint: step_00000060" in story.job_log
    )
    assert story.rank_log(1).count("rank 1 of 2 starts after step") == 2, "two nodes, two jobs"
    assert "stopped at step" in story.rank_log(0) and story.rank_log(0).endswith("finished\n")


def test_status_shows_the_step_of_a_run(stories: dict[str, Story]) -> None:
    result = stories["requeued"].notes["status"]
    said = json.loads(result.stdout)
    assert said["job"]["state"] == "RUNNING" and said["job"]["nodes"] == "n[1-2]"
    assert 13 <= said["progress"]["step"] < STEPS and said["progress"]["total_steps"] == STEPS
    left = said["progress"]["seconds_left"]
    assert left > 0.1 * (STEPS - said["progress"]["step"]) * 0.9, "ten steps a second at most"


def test_a_chain_is_not_one_job_longer_than_it_must_be(stories: dict[str, Story]) -> None:
    story = stories["chained"]
    first, second, spare = story.notes["jobs"]
    assert second.state == "COMPLETED" and first.run_time != "00:00:00"
    assert spare.state == "CANCELLED" and spare.run_time == "00:00:00", "it never started"
    assert story.run.checkpoint_step() == STEPS and story.rank_log(0).count("starts after step") == 2


def test_a_preempted_job_saves_in_its_grace_time_and_comes_back(stories: dict[str, Story]) -> None:
    story = stories["preempted"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    assert "again: preempted" in story.job_log and story.run.checkpoint_step() == STEPS
    assert story.rank_log(0).count("starts after step") == 2 and "stopped at step" in story.rank_log(0)


def test_a_failed_rank_is_named_once_and_restarts_in_the_same_allocation(stories: dict[str, Story]) -> None:
    story = stories["broken"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("COMPLETED", 0)
    assert story.job_log.count("ValueError: rank 1 broke at step 25") == 1
    assert "rank 1 on" in story.job_log and "Connection closed" not in story.job_log
    assert (
        "here: it failed with status 1 after a new checkpoint was written; newest checkpoint: step_00000020"
        in story.job_log
    )
    assert "starts after step 20" in story.rank_log(1)
    assert [folder.name for folder in story.run.attempts()] == [f"slurm-{job.number}-0", f"slurm-{job.number}-0-2"]


def test_failures_without_progress_end(stories: dict[str, Story]) -> None:
    story = stories["hopeless"]
    jobs = story.notes["jobs"]
    assert [job.state for job in jobs] == ["FAILED", "CANCELLED"]
    assert "here: it failed with SIGKILL" in story.job_log
    assert "stop: it failed with SIGKILL" in story.job_log and "1 restarts in a row brought no new" in story.job_log


@pytest.mark.parametrize("name", ["killed", "killed_chain"])
def test_a_rank_killed_while_others_start_does_not_end_the_run(name: str, stories: dict[str, Story]) -> None:
    """srun then returns 143, the status of the ranks that it ended itself, although nobody cancelled the job."""
    story = stories[name]
    assert story.notes["jobs"][0].state == "COMPLETED" and story.run.checkpoint_step() == STEPS
    assert "rank 1 on n2 failed first, with SIGKILL" in story.job_log
    assert "here: it failed with SIGKILL (status 137; out of memory?); restart 1 of 1" in story.job_log


def test_a_chain_survives_a_lost_node(stories: dict[str, Story]) -> None:
    story = stories["down"]
    first, second, *spare = story.notes["jobs"]
    assert (first.state, second.state) == ("NODE_FAIL", "COMPLETED"), story.job_log
    assert [job.state for job in spare] == ["CANCELLED"] and story.run.checkpoint_step() == STEPS
    assert "again: a node was lost" in story.job_log


def test_a_job_script_that_dies_early_submits_nothing(stories: dict[str, Story]) -> None:
    story = stories["early"]
    assert [job.state for job in story.notes["jobs"]] == ["FAILED"]


def test_setup_lines_may_read_variables_that_are_not_set(stories: dict[str, Story]) -> None:
    story = stories["unset"]
    assert story.notes["jobs"][0].state == "COMPLETED" and story.run.checkpoint_step() == STEPS


def test_a_chain_whose_nodes_may_not_submit_reports_it_and_continues(stories: dict[str, Story]) -> None:
    story = stories["forbidden"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("COMPLETED", 1) and story.run.checkpoint_step() == STEPS
    assert "sbatch does not take the next job (see above); this job goes back into the queue" in story.job_log
    assert "Access/permission denied" in story.job_log
    assert "sbatch: error: Access/permission denied" in str(story.notes["status"])


def test_a_mistake_is_not_tried_again(stories: dict[str, Story]) -> None:
    story = stories["mistaken"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("FAILED", 0)
    assert "data.folder=nowhere is not there." in story.job_log
    assert "stop: the recipe, the data or the machine must be changed first" in story.job_log


def test_two_jobs_never_write_into_one_run(stories: dict[str, Story]) -> None:
    assert any(f"is already {state}" in stories["requeued"].notes["second"] for state in ("running", "pending"))


def test_cancel_saves_first_and_leaves_no_job_behind(stories: dict[str, Story]) -> None:
    story = stories["cancelled"]
    result = story.notes["cancel"]
    assert result.returncode == 0, result.stderr
    assert "save and stop" in result.stderr and "Newest checkpoint: step_" in result.stderr
    _first, waiting, again = story.notes["jobs"]
    assert waiting.state == "CANCELLED" and waiting.run_time == "00:00:00"
    assert f"stopped at step {story.notes['checkpoint']}" in story.rank_log(0), "not at the last regular checkpoint"
    assert "No job" not in story.notes["status"].stdout and "newest checkpoint: step_" in story.notes["status"].stdout
    assert again.state == "COMPLETED" and story.run.checkpoint_step() == STEPS, "submitted again, it continues"
    assert f"starts after step {story.notes['checkpoint']}" in story.rank_log(0)


def test_scancel_alone_saves_and_does_not_come_back(stories: dict[str, Story]) -> None:
    story = stories["ended"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert f"stopped at step {story.run.checkpoint_step()}" in story.rank_log(0)
    assert story.run.checkpoint_step() < STEPS


def test_requested_gpus_are_visible(stories: dict[str, Story]) -> None:
    assert "CUDA_VISIBLE_DEVICES=0,1" in stories["requeued"].rank_log(0)
    assert "CUDA_VISIBLE_DEVICES=none" in stories["chained"].rank_log(0)


def test_cancel_of_a_run_without_jobs_says_so(stories: dict[str, Story]) -> None:
    environment = os.environ.get("SLURM_CONF")
    assert environment, "the cluster still runs"
    result = launch("cancel", str(stories["requeued"].run.path))
    assert result.returncode == 0 and "has no waiting or running job" in result.stderr


def test_names_and_options_reach_slurm_as_they_are_and_the_copy_of_the_code_runs(stories: dict[str, Story]) -> None:
    story = stories["hostile"]
    (job,) = story.notes["jobs"]
    assert job.state == "COMPLETED" and story.run.checkpoint_step() == 20, story.job_log
    shown = story.notes["text"]
    assert f"JobName={HOSTILE} " in shown and "Comment=my job " in shown
    assert "finished" in (story.run.logs / f"slurm-{job.number}.log").read_text()
    assert (story.run.logs / "code" / "launch" / "slurm" / "after_job.py").is_file()
