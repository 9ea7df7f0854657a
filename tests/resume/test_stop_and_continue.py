"""SIGTERM and SIGUSR1 to real runs: they save at the end of the step, exit with 128 + the signal, and continue bitwise equal."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crashes import acts_of_saves
from killed_runs import contents_at
from processes import STEPS, finish, fork, losses, saves, start, wait_for_step

from recipes.schema import checkpoint_steps as steps
from recipes.schema.run_folder import METRICS, read_metrics
from train.checkpoint import offline
from train.resilience.faults import ECHO_S, SECOND_SIGNAL_STATUS


@contextmanager
def slow_saves() -> Iterator[None]:
    """Each save takes four seconds before it can be published."""
    with acts_of_saves(lambda act: time.sleep(4) if act.name == "writev" and "manifest" in act.target else None):
        yield


def newest(run: Path) -> Path:
    path = steps.steps_in(run / "checkpoints")[-1]
    assert offline.verify(path, lambda _: None) == []
    return path


def test_each_way_to_be_stopped_loses_nothing_that_is_saved(words: list[str], tmp_path: Path) -> None:
    finish(fork(words, "whole"))
    whole, run = losses(tmp_path / "whole"), tmp_path / "run"

    child = fork(words, "run", step_s=0.05)
    wait_for_step(run, 3, child)
    child.send_signal(signal.SIGUSR1)
    said = finish(child, status=128 + signal.SIGUSR1)
    stopped = max(losses(run))
    assert f"Stopped at step {stopped} (SIGUSR1); the checkpoint is written" in said
    assert newest(run).name == steps.name_of(stopped)

    # The grace period is over when the save that was under way at the signal ends: that one counts.
    child = fork(words, "run", extra=("launch.grace_s=4",), within=slow_saves, step_s=0.05)
    wait_for_step(run, 13, child)
    child.send_signal(signal.SIGTERM)
    said = finish(child, status=128 + signal.SIGTERM)
    saved = saves(run)[-1]
    assert saved in (12, 18) and max(losses(run)) > saved and newest(run).name == steps.name_of(saved)
    assert (
        f"Stopped at step {saved} (SIGTERM)" in said
        and f"the last saved step is {saved}. To lose no steps, raise launch.grace_s" in said
    )

    # A second signal, in the middle of the next save.
    child = fork(words, "run", within=slow_saves, step_s=0.05)
    wait_for_step(run, min(saved + 7, STEPS), child)
    child.send_signal(signal.SIGTERM)
    time.sleep(ECHO_S + 0.2)
    child.send_signal(signal.SIGTERM)
    finish(child, status=SECOND_SIGNAL_STATUS)
    assert newest(run).name == steps.name_of(saved)

    finish(fork(words, "run"))
    assert losses(run) == whole
    last = steps.name_of(STEPS)
    assert contents_at(run / "checkpoints" / last) == contents_at(tmp_path / "whole" / "checkpoints" / last)
    resumed = [line["step"] for line in read_metrics(run / METRICS) if line["kind"] == "resume"]
    assert resumed == [stopped, saved, saved]


def test_a_closed_terminal_and_a_ctrl_c_in_the_last_evaluation_lose_nothing(words: list[str], tmp_path: Path) -> None:
    child = fork(words, "hung", step_s=0.05)
    wait_for_step(tmp_path / "hung", 3, child)
    child.send_signal(signal.SIGHUP)
    said = finish(child, status=128 + signal.SIGHUP)
    assert f"Stopped at step {max(losses(tmp_path / 'hung'))} (SIGHUP); the checkpoint is written" in said
    assert newest(tmp_path / "hung").name == steps.name_of(max(losses(tmp_path / "hung")))

    child = fork(words, "hung", within=interrupted_in_the_last_evaluation)
    said = finish(child)
    assert f"Finished at step {STEPS}" in said and "nothing was written" not in said and "interrupted" not in said


@contextmanager
def interrupted_in_the_last_evaluation() -> Iterator[None]:
    from train import run

    real = run.heldout_bits_per_byte

    def interrupted(*arguments: Any, **named: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    run.heldout_bits_per_byte = interrupted
    yield


def test_a_signal_to_one_of_two_ranks_stops_both_alike(words: list[str], tmp_path: Path) -> None:
    child = fork(words, "pair", ranks=2, step_s=0.05)
    wait_for_step(tmp_path / "pair", 2, child)
    child.pids, others = child.pids[1:], child.pids[:1]
    child.send_signal(signal.SIGUSR1)
    child.pids = [*others, *child.pids]
    finish(child, status=128 + signal.SIGUSR1)
    assert newest(tmp_path / "pair").name == steps.name_of(max(losses(tmp_path / "pair")))


def test_the_launcher_stops_two_ranks_and_continues_them(words: list[str], tmp_path: Path) -> None:
    """`stratum launch local --nproc 2`, as a user starts it; the run then continues in forked processes."""
    endless = ("run.steps=100000", "checkpoint.every_steps=0")
    child = start(words, "run", ranks=2, extra=endless, launcher="local")
    wait_for_step(tmp_path / "run", 3, child)
    child.send_signal(signal.SIGTERM)
    finish(child, status=128 + signal.SIGTERM)
    stopped = max(losses(tmp_path / "run"))
    assert saves(tmp_path / "run")[-1] == stopped
    finish(fork(words, "run", ranks=2, extra=(*endless, "run.stop_after_steps=3")))
    end = stopped + 3
    finish(fork(words, "whole", ranks=2, extra=(*endless, f"run.stop_after_steps={end}")))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    last = Path("checkpoints") / steps.name_of(end)
    assert contents_at(tmp_path / "run" / last) == contents_at(tmp_path / "whole" / last)
