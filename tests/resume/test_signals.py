"""Signals: the first requests a save, its echoes are ignored, a second one ends the process at once, even in a blocked call."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from train.resilience.faults import ECHO_S, SECOND_SIGNAL_STATUS, StopSignals, grace_warning


def in_a_child(work: Callable[[StopSignals], None]) -> int:
    """Fork a process that runs under StopSignals and exits with 128 + the received signal. -> its pid, once it is ready."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with StopSignals() as signals:
            os.write(writer, b"x")
            work(signals)
            os._exit(128 + (signals.received or 0))
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return pid


def status_of(pid: int, within_s: float) -> int | None:
    """Exit status, or None if it still runs after that long."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def step_of(seconds: float) -> Callable[[StopSignals], None]:
    """A step that takes this long, then its boundary."""

    def work(signals: StopSignals) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end or signals.received is None:
            time.sleep(0.01)

    return work


def stuck(_signals: StopSignals) -> None:
    """In a call that never returns to Python, as in a collective whose peer is gone: handlers cannot run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ())
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_answered_at_the_end_of_the_step(number: signal.Signals) -> None:
    pid = in_a_child(step_of(0.4))
    os.kill(pid, number)
    assert status_of(pid, 0.1) is None
    assert status_of(pid, 5) == 128 + number


def test_a_closed_terminal_does_not_stop_a_run_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_echo_of_a_signal_is_no_second_one() -> None:
    """Slurm and torchrun, or a terminal and torchrun, both pass the warning on."""
    pid = in_a_child(step_of(0.5))
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.kill(pid, number)
        time.sleep(0.02)
    assert status_of(pid, 5) == 128 + signal.SIGUSR1


@pytest.mark.parametrize("work", [step_of(60), stuck], ids=["long step", "stuck"])
def test_a_second_signal_ends_the_process_at_once(work: Callable[[StopSignals], None]) -> None:
    pid = in_a_child(work)
    os.kill(pid, signal.SIGTERM)
    time.sleep(ECHO_S + 0.1)
    assert status_of(pid, 0.05) is None
    os.kill(pid, signal.SIGTERM)
    assert status_of(pid, 2) == SECOND_SIGNAL_STATUS


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert signals.received is signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before


def test_too_little_time_to_save_is_reported_in_advance() -> None:
    assert grace_warning(10, save_s=20, grace_s=60, before_end_s=30) is None
    text = grace_warning(50, save_s=20, grace_s=60, before_end_s=300)
    assert text is not None and "launch.grace_s=60" in text and "50 s" in text
    text = grace_warning(20, save_s=20, grace_s=60, before_end_s=30)
    assert text is not None and "launch.slurm.save_before_end_s=30" in text and "SIGUSR1" in text


def test_slurms_warning_during_start_up_is_not_lost_and_kills_nobody(tmp_path: Path) -> None:
    """A rank that still imports when SIGUSR1 comes stops at its first step boundary, as if it had come later."""
    (tmp_path / "late_trainer.py").write_text(
        "import sys, time\nprint('importing', flush=True)\ntime.sleep(0.5)\n"
        "from train.resilience.faults import StopSignals\n"
        "with StopSignals() as signals:\n    time.sleep(0.05)\n    print(signals.received.name, flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "launch.local.rank", "late_trainer"],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).resolve().parents[2]}:{tmp_path}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGUSR1)
    assert child.communicate(timeout=60)[0] == "SIGUSR1\n" and child.returncode == 0
