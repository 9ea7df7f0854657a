"""A disk that another process fills in the middle of a run, and that later has space again: a small real file system."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from crashes import Act, acts_of_saves
from killed_runs import contents_at
from mounts import mount_in_memory
from processes import STEPS, finish, fork, losses
from ranks import run_ranks

from recipes.schema import checkpoint_steps as steps
from recipes.schema.run_folder import METRICS, read_metrics
from train.report import summary as report


@contextmanager
def filled_by_another_process(disk: Path, *, from_step: int, to_step: int) -> Iterator[None]:
    """The disk has no byte left from the save of one step until that of another."""

    def before(act: Act) -> None:
        if act.name == "mkdir" and f"step_{from_step:08d}" in act.target:
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={disk / 'foreign'}", "bs=4096"], capture_output=True, check=False
            )
        if act.name == "mkdir" and f"step_{to_step:08d}" in act.target:
            (disk / "foreign").unlink(missing_ok=True)

    with acts_of_saves(before):
        yield


def on_a_small_disk(_rank: int, words: list[str], disk: Path) -> None:
    mount_in_memory(disk)
    there = (f"run.folder={disk}",)  # only the run: what it prints is in a folder with space
    last = Path("checkpoints") / steps.name_of(STEPS)

    def within(to_step: int) -> Callable[[], Iterator[None]]:
        return lambda: filled_by_another_process(disk, from_step=4, to_step=to_step)

    said = finish(fork(words, "continues", extra=(*there, "checkpoint.on_failure=continue"), within=within(18)))
    run = disk / "continues"
    assert "step 4 was not saved: cannot save into" in said and "0 free" in said and "Free some space" in said, said
    assert "metrics.jsonl cannot be written: No space left on device. Its lines wait in memory" in said, said
    uninterrupted = losses(run), contents_at(run / last)
    assert list(uninterrupted[0]) == list(range(1, STEPS + 1))
    lines = read_metrics(run / METRICS)
    assert [line["step"] for line in lines if line["kind"] == "save_failed"] == list(range(4, 18, 2))
    assert [line["step"] for line in lines if line["kind"] == "save"] == [2, 18, 20, 22, 24]

    said = finish(fork(words, "stops", extra=there, within=within(STEPS)), status=2)
    assert "No space left on device" in said or "0 free" in said, said
    assert "ree some space" in said and "Traceback" not in said, said
    run = disk / "stops"
    assert [path.name for path in steps.steps_in(run / "checkpoints")] == [steps.name_of(2)]
    (disk / "foreign").unlink()
    finish(fork(words, "stops", extra=there))
    assert (losses(run), contents_at(run / last)) == uninterrupted


def test_a_disk_filled_by_another_process_stops_a_run_or_not_and_loses_nothing(
    words: list[str], tmp_path: Path
) -> None:
    saves = ["checkpoint.every_steps=2", "checkpoint.retries=1", "checkpoint.retry_wait_s=0.01"]
    words = [*(word for word in words if not word.startswith("checkpoint.every_steps=")), *saves]
    (tmp_path / "disk").mkdir()
    run_ranks(1, on_a_small_disk, words, tmp_path / "disk")


@contextmanager
def full_at_the_report() -> Iterator[None]:
    with mock.patch.object(report, "draw", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "loss.png")):
        yield


def test_a_finished_run_is_finished_when_its_report_finds_the_disk_full(words: list[str], tmp_path: Path) -> None:
    said = finish(fork(words, "run", extra=("run.steps=7", "schedule.decay=0"), within=full_at_the_report))
    assert "Finished at step 7. No summary: [Errno 28] No space left on device: 'loss.png'" in said, said
    assert f"stratum report {tmp_path / 'run'}" in said and "Traceback" not in said, said
