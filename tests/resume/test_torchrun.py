"""torchrun can start the trainer: its processes train like one. (By default, two ranks are those of `stratum launch local`:
test_stop_and_continue.)"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import RUN, finish, fork, losses, saves, start, wait_for_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_torchrun_on_two_ranks_trains_the_same(words: list[str], tmp_path: Path) -> None:
    short = (*RUN, "run.steps=8", "schedule.warmup=2", "checkpoint.every_steps=4")
    layout = ("parallel.tensor=2", "parallel.sequence=true", "model.mamba_groups=2")
    finish(fork(words, "one", extra=(*short, "model.mamba_groups=2")))
    finish(start(words, "two", ranks=2, extra=(*short, *layout)))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(two) == list(range(1, 9))
    assert [two[s] for s in sorted(two)] == pytest.approx([one[s] for s in sorted(one)], rel=2e-6)


@pytest.mark.slow
def test_an_error_of_the_recipe_is_printed_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "-m", "train", "-cn", "smoke"]
    done = subprocess.run(
        [*command, "parallel.tensor=3", f"run.folder={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode and done.stderr.count("parallel.tensor=3 does not divide") == 1
    assert not [line for line in done.stderr.splitlines() if line.startswith("error on rank")]


ORPHAN = """
import os, sys, time
from data.system.parent import end_with_parent
from train.resilience.faults import StopSignals
if os.fork():
    time.sleep(60)
assert end_with_parent()
with StopSignals() as signals:
    print(os.getpid(), flush=True)
    while signals.received is None:
        time.sleep(0.01)
    print(signals.received.name, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_a_process_notices_that_its_parent_is_gone(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline()
    parent.send_signal(number)
    assert parent.communicate(timeout=30)[0] == "SIGTERM\n"


def test_a_rank_of_torchrun_under_nohup_takes_the_sighup_that_torchrun_passes_on() -> None:
    program = (
        "import signal; from train.__main__ import follow_torchrun\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); follow_torchrun(); print(signal.getsignal(signal.SIGHUP).name)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "SIG_DFL\n"


@pytest.mark.slow
def test_ranks_save_and_stop_when_the_terminal_of_a_torchrun_under_nohup_closes(
    words: list[str], tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; processes inherit it
    try:
        child = start(words, "nohup", ranks=2, extra=("run.steps=100000", "checkpoint.every_steps=0"))
    finally:
        signal.signal(signal.SIGHUP, before)
    run = tmp_path / "nohup"
    wait_for_step(run, 4, child)
    child.send_signal(signal.SIGHUP)
    output, _ = child.communicate(timeout=120)
    assert "Stopped at step" in output and "(SIGHUP); the checkpoint is written" in output
    assert saves(run)[-1] == max(losses(run)), "nothing is lost"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_ranks_save_and_stop_when_torchrun_dies(number: signal.Signals, words: list[str], tmp_path: Path) -> None:
    """torchrun handles SIGTERM, SIGINT, SIGHUP and SIGQUIT; any other signal kills it, and its processes receive nothing."""
    run = tmp_path / "orphans"
    child = start(words, "orphans", ranks=2, extra=("run.steps=100000", "checkpoint.every_steps=0"))
    wait_for_step(run, 4, child)
    child.send_signal(number)
    output, _ = child.communicate(timeout=120)  # until the last rank has closed it
    assert child.returncode == -number
    assert "Stopped at step" in output and "(SIGTERM); the checkpoint is written" in output
    assert saves(run)[-1] == max(losses(run)), "nothing is lost"
    time.sleep(0.5)
    assert '"is_released": true' in next((run / "lease").glob("*.json")).read_text(), "and no orphan keeps the run"
