"""Job scripts on a real Slurm, over two nodes: requeued and chained continuation, failures, mistakes, cancel, status.

The training is pretended (tests/pretend.py); tests/launch/test_slurm_training.py trains for real. All jobs run side by
side; the module's fixture waits for all of them.
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

from launch.runs import RunFolder
from launch.slurm.command import active_jobs, job_numbers, submit_run
from launch.slurm.job_script import Job, training_script
from launch.slurm.queue import SlurmError, cancel, look_up, send_signal
from recipes.schema.launch import ContainerConfig, SlurmConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = 150
JOB = Job(
    name="pretended",
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
    module="pretend",
)
CHAIN = replace(JOB.slurm, continuation="chain")
SPARE = replace(JOB.slurm, partition="spare", options="--nodelist=n[3-4]")
HELD = ("--hold", "20", "--patience-s", "60")
"""Does not end before it is told to stop, however long the machine takes to do that."""
URGENT = ("--partition=urgent", "--nodelist=n3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


@dataclass(frozen=True)
class Story:
    """A run that has ended, and what was seen on the way."""

    run: RunFolder
    notes: dict[str, object]

    @property
    def job_log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run.logs.glob("slurm-*.log")))

    def rank_log(self, rank: int) -> str:
        """Of all attempts, in order."""
        return "".join((folder / f"rank-{rank:05d}.log").read_text() for folder in self.run.attempts())


def begin(root: Path, name: str, *words: str, slurm: SlurmConfig = JOB.slurm, gpus: int = 0) -> RunFolder:
    run = RunFolder(root / name)
    words = (str(run.path), "--steps", str(STEPS), "--step-s", "0.1", *words)
    submit_run(
        run,
        training_script(replace(JOB, name=name, folder=str(run.path), words=words, slurm=slurm, gpus_per_node=gpus)),
    )
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
    """Every scenario of this module, run to its end on one cluster."""
    root = tmp_path_factory.mktemp("runs")
    with slurm_rig(4):
        runs = {
            "requeued": begin(root, "requeued", *HELD, gpus=2),
            "chained": begin(root, "chained", *HELD, slurm=CHAIN),
            "broken": begin(root, "broken", "--fail", "1:25:raise", "--fail", "0:25:peer"),
            "hopeless": begin(root, "hopeless", "--fail", "1:5:kill:always", slurm=CHAIN),
            "mistaken": begin(root, "mistaken", "--fail", "1:5:error"),
            "preempted": begin(root, "preempted", *HELD, slurm=SPARE),
        }
        notes: dict[str, dict[str, object]] = {name: {} for name in runs}
        wait_for(lambda: reached(runs["preempted"], 13))
        subprocess.run(["sbatch", *URGENT], check=True, capture_output=True)
        for name in ("requeued", "chained"):
            wait_for(lambda name=name: reached(runs[name], 13))
            notes[name]["status"] = launch("status", str(runs[name].path), "--json")
            send_signal(job_numbers(runs[name])[0], "USR1")
        with pytest.raises(SlurmError) as second:
            submit_run(runs["broken"], "#!/bin/bash\n")
        notes["broken"]["second"] = str(second.value)
        for run in runs.values():
            wait_for(lambda run=run: not active_jobs(run))

        run = runs["cancelled"] = begin(root, "cancelled", *HELD, slurm=CHAIN)
        ended = runs["ended"] = begin(root, "ended", *HELD)
        notes["cancelled"], notes["ended"] = {}, {}
        wait_for(lambda: reached(run, 13) and reached(ended, 13))
        notes["cancelled"]["cancel"] = launch("cancel", str(run.path))
        notes["cancelled"]["checkpoint"] = run.checkpoint_step()
        notes["cancelled"]["status"] = launch("status", str(run.path))
        cancel(job_numbers(ended)[0])
        begin(root, "cancelled")
        for last in (run, ended):
            wait_for(lambda last=last: not active_jobs(last))
        for name, run in runs.items():
            notes[name]["jobs"] = look_up(job_numbers(run))
        yield {name: Story(run, notes[name]) for name, run in runs.items()}


def test_time_is_up_and_the_same_job_continues_to_the_last_step(stories: dict[str, Story]) -> None:
    story = stories["requeued"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    assert story.run.checkpoint_step() == STEPS
    assert (
        "again: time was up" in story.job_log
        and "finished: finished; newest checkpoint: step_00000150" in story.job_log
    )
    assert story.rank_log(1).count("rank 1 of 2 starts after step") == 2, "two nodes, two jobs"
    assert "stopped at step" in story.rank_log(0) and story.rank_log(0).endswith("finished\n")


def test_status_tells_where_a_run_is(stories: dict[str, Story]) -> None:
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


def test_a_failed_rank_is_named_once_and_the_job_goes_on(stories: dict[str, Story]) -> None:
    story = stories["broken"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    assert story.job_log.count("ValueError: rank 1 broke at step 25") == 1
    assert "rank 1 on" in story.job_log and "Connection closed" not in story.job_log
    assert "restart 1 of 1 without a new checkpoint; newest checkpoint: step_00000020" in story.job_log
    assert "starts after step 20" in story.rank_log(1)


def test_failures_without_progress_end(stories: dict[str, Story]) -> None:
    story = stories["hopeless"]
    jobs = story.notes["jobs"]
    assert [job.state for job in jobs] == ["FAILED", "FAILED", "CANCELLED"]
    assert "stop: it failed with SIGKILL" in story.job_log and "1 restarts in a row brought no new" in story.job_log


def test_a_mistake_is_not_tried_again(stories: dict[str, Story]) -> None:
    story = stories["mistaken"]
    (job,) = story.notes["jobs"]
    assert (job.state, job.restarts) == ("FAILED", 0)
    assert "data.folder=nowhere is not there." in story.job_log
    assert "stop: the recipe, the data or the machine has to be changed first" in story.job_log


def test_two_jobs_never_write_into_one_run(stories: dict[str, Story]) -> None:
    assert any(f"is {state} already" in stories["broken"].notes["second"] for state in ("running", "pending"))


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


def test_gpus_are_asked_for_and_seen(stories: dict[str, Story]) -> None:
    assert "CUDA_VISIBLE_DEVICES=0,1" in stories["requeued"].rank_log(0)
    assert "CUDA_VISIBLE_DEVICES=none" in stories["chained"].rank_log(0)


def test_cancel_of_a_run_without_jobs_says_so(stories: dict[str, Story]) -> None:
    environment = os.environ.get("SLURM_CONF")
    assert environment, "the cluster still runs"
    result = launch("cancel", str(stories["requeued"].run.path))
    assert result.returncode == 0 and "No job of" in result.stderr
