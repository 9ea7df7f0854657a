"""What follows when processes end: the whole table of the rule, and the messages of failing ranks."""

from pathlib import Path

import pytest

from launch.local.continuation import Decision, decide, describe, shell_status
from launch.local.failures import (
    SRUN_LOG,
    RankFailure,
    by_cause,
    failure_message,
    log_of,
    read_failures,
    read_silent_failures,
    write_failure,
)
from launch.runs import RunFolder


def after(status: int, **facts: object) -> Decision:
    known = {"at_last_step": False, "has_new_checkpoint": False, "failures": 0, "restarts": 2, "in_queue": True}
    return decide(status, **{**known, **facts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "facts", "action", "failures"),
    [
        (0, {"at_last_step": True}, "finished", 0),
        (0, {"in_queue": False}, "finished", 0),  # paused: the user continues
        (0, {"has_new_checkpoint": True}, "again", 0),  # paused: the next job continues
        (0, {"failures": 2}, "stop", 3),  # pauses without a step, again and again
        (138, {"has_new_checkpoint": True, "failures": 2}, "again", 0),
        (138, {}, "again", 1),
        (138, {"failures": 2}, "stop", 3),  # the time limit is too short for one step
        (138, {"in_queue": False, "has_new_checkpoint": True}, "stop", 0),
        (143, {"has_new_checkpoint": True}, "stop", 0),
        (143, {"has_new_checkpoint": True, "is_preempted": True}, "again", 0),
        (143, {"is_preempted": True}, "again", 1),
        (1, {"is_preempted": True, "has_new_checkpoint": True}, "again", 0),
        (143, {"stop_requested": False}, "again", 1),  # srun ended the ranks because one was killed
        (143, {"stop_requested": False, "failures": 2}, "stop", 3),
        (130, {}, "stop", 0),
        (2, {"has_new_checkpoint": True}, "stop", 0),
        (3, {"has_new_checkpoint": True, "is_preempted": True}, "stop", 0),  # NaN: the same steps again
        (4, {"has_new_checkpoint": True}, "stop", 0),  # which may contain wrong numbers
        (1, {}, "again", 1),
        (1, {"failures": 1}, "again", 2),
        (137, {"failures": 2}, "stop", 3),
        (137, {"failures": 2, "has_new_checkpoint": True}, "again", 0),  # it made progress in between
        (137, {"at_last_step": True, "in_queue": False}, "again", 1),  # the last evaluation is missing
    ],
)
def test_the_rule(status: int, facts: dict[str, object], action: str, failures: int) -> None:
    decision = after(status, **facts)
    assert (decision.action, decision.failures) == (action, failures), decision.reason


def test_no_restart_if_none_is_allowed() -> None:
    assert after(1, restarts=0).action == "stop"
    assert after(1, restarts=0, has_new_checkpoint=True).action == "stop"


def test_no_back_off_and_no_count_after_a_new_checkpoint() -> None:
    decision = after(137, has_new_checkpoint=True, failures=2)
    assert decision.failures == 0
    assert "after a new checkpoint was written" in decision.reason and "without a new checkpoint" not in decision.reason


def test_statuses_as_shells_give_them() -> None:
    assert (shell_status(-9), shell_status(3)) == (137, 3)
    assert describe(139) == "SIGSEGV (status 139)" and describe(5) == "status 5"


def test_causes_come_before_consequences_also_against_the_clocks(tmp_path: Path) -> None:
    for rank, at, error in ((0, 1.0, "RuntimeError: Connection reset by peer"), (5, 2.0, "OutOfMemoryError: 80 GiB")):
        write_failure(tmp_path, RankFailure(rank, 1, at, "n1", error))
    (tmp_path / "failure-00007.json").write_text('{"rank": 7, "sta')  # killed while writing
    failures = read_failures(tmp_path)
    assert [f.rank for f in failures] == [5, 0]
    said = failure_message(tmp_path, failures)
    assert said.startswith("rank 5 on n1 failed first, with status 1:\n    OutOfMemoryError") and "reset" not in said


def test_the_last_message_in_a_log_is_the_error(tmp_path: Path) -> None:
    log_of(tmp_path, 3).write_text("error: an old one\nstep 1\nerror on rank 3: a=b is wrong.\nUse a=c.\n")
    failures = by_cause(tmp_path, [RankFailure(3, 2, 0.0)])
    assert "    error on rank 3: a=b is wrong.\n    Use a=c.\n" in failure_message(tmp_path, failures)
    log_of(tmp_path, 0).write_text("error: a=b is wrong.\nUse a=c.\n")
    failures.append(RankFailure(0, 2, 1.0))
    assert "the error above" in failure_message(tmp_path, failures, seen_live=frozenset([0])), (
        "rank 0 has shown the same"
    )


def test_a_long_traceback_is_shortened_to_its_end(tmp_path: Path) -> None:
    text = "\n".join(["Traceback (most recent call last):", *(f"  line {n}" for n in range(100)), "ValueError: x"])
    said = failure_message(tmp_path, [RankFailure(0, 1, 0.0, "", text)]).splitlines()
    assert len(said) < 40 and said[1].strip().startswith("Traceback") and "ValueError: x" in said[-2]


def test_progress_is_read_from_the_end_of_a_growing_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.progress() is None and run.newest_checkpoint() is None and run.checkpoint_step() == 0
    (tmp_path / "recipe.yaml").write_text("run: {steps: 5000}\n")
    step = '{{"kind": "step", "step": {n}, "loss": 2.5, "tokens_per_s": 10, "time": {t}}}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(step.format(n=n, t=2 * n) for n in range(1, 4001)) + '{"kind": "st')
    progress = run.progress()
    assert progress is not None and (progress.step, progress.total_steps) == (4000, 5000)
    assert progress.seconds_left == pytest.approx(2000)
    (tmp_path / "checkpoints" / "step_00000300").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000400")  # torn: the checkpoint does not exist
    assert run.newest_checkpoint() == "step_00000300" and run.checkpoint_step() == 300


def test_ranks_that_srun_reports_killed_are_failures_and_those_it_ended_itself_are_not(tmp_path: Path) -> None:
    """The lines are those of Slurm 22.05 after `kill -9` of a rank, and of one that its cgroup killed."""
    (tmp_path / SRUN_LOG).write_text(
        "srun: error: n2: task 1: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=1.0\n"
        "srun: error: n1: task 0: Terminated\nsrun: error: n3: tasks 4-5: Out Of Memory\n"
        "srun: error: n4: task 6: Exited with exit code 1\n"
    )
    found = read_silent_failures(tmp_path)
    assert [(f.rank, f.status, f.host) for f in found] == [(1, 137, "n2"), (4, 137, "n3")]
    write_failure(tmp_path, RankFailure(6, 1, 5.0, "n4", "RuntimeError: Connection closed by peer"))
    causes = by_cause(tmp_path, read_failures(tmp_path) + found)
    assert causes[0].rank == 1, "a kill without a record is the cause of a lost connection"
    write_failure(tmp_path, RankFailure(7, 1, 6.0, "n4", "ValueError: x"))
    causes = by_cause(tmp_path, read_failures(tmp_path) + found)
    assert causes[0].rank == 7, "a recorded error comes before a kill"
