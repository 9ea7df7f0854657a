"""Ranks forked from one process that has done the imports: the same statuses, logs, signals and ends as new processes have."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from local_runs import ENVIRONMENT, attempts, finish, start, wait_for_step, wait_until

MODULE = """\
import pathlib, threading, time
with pathlib.Path({marks!r}).open("a") as stream:
    stream.write("imported\\n")
"""
THREAD = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a line at each import of the module `marked`, and `thready`, which also starts a thread."""
    marks = tmp_path / "marks"
    (tmp_path / "marked.py").write_text(MODULE.format(marks=str(marks)))
    (tmp_path / "thready.py").write_text(MODULE.format(marks=str(marks)) + THREAD)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ENVIRONMENT['PYTHONPATH']}:{tmp_path}")
    return marks


def warm_process_of(launcher: subprocess.Popen[str]) -> int:
    """Process id of the launcher's warm process."""
    (pid,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(pid)


def test_a_restart_imports_nothing_again(marks: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    failing = ("--steps", "30", "--fail", "1:15:kill")
    out, err = finish(start(run, 2, *failing, options=("--warm", "marked")), status=0)
    assert marks.read_text() == "imported\n", "once for four ranks"
    assert out == "rank 0 of 2 starts after step 0\nrank 0 of 2 starts after step 10\nfinished\n"
    assert (
        "rank 1" in err and "failed first, with SIGKILL" in err and "starting again from step_00000010 at once" in err
    )
    first, second = attempts(run)
    assert (first / "rank-00001.log").read_text() == "rank 1 of 2 starts after step 0\n"
    assert (second / "rank-00001.log").read_text() == "rank 1 of 2 starts after step 10\nfinished\n"
    _, err = finish(start(tmp_path / "wrong", 2, "--fail", "1:3:error", options=("--warm", "marked")), status=2)
    assert err.count("data.folder=nowhere is not there.") == 1, "exit statuses and records are the ranks' own"


def test_signals_reach_forked_ranks_and_none_outlives_the_launcher(marks: Path, tmp_path: Path) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        run = tmp_path / number.name
        child = start(run, 3, "--steps", "2000", options=("--warm", "marked"))
        wait_for_step(run, 3)
        warm = warm_process_of(child)
        child.send_signal(number)
        child.communicate(timeout=60)
        assert child.returncode == status
        (logs,) = attempts(run)
        wait_until(lambda logs=logs: all("stopped at step" in path.read_text() for path in logs.glob("*.log")))
        wait_until(lambda warm=warm: not os.path.exists(f"/proc/{warm}"))


def test_a_rank_that_hangs_is_shown_with_its_python_stack(marks: Path, tmp_path: Path) -> None:
    failing = ("--fail", "1:5:hang", "--fail", "0:5:peer")
    for number, options in enumerate((("--warm", "marked"), ("--show", "2"))):
        _, err = finish(start(tmp_path / f"run{number}", 2, *failing, options=options), status=0)
        (stack,) = re.findall(r"launch: rank 1 was still running \(innermost call first\):\n((?:    File .*\n)+)", err)
        assert re.match(
            r' +File ".*simulated_train.py", line \d+ in _fail\n +File ".*simulated_train.py", line \d+ in main\n',
            stack,
        )
        assert "rank 0 was still running" not in err


def test_without_the_warm_process_ranks_start_in_the_ordinary_way(marks: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(run, 2, "--steps", "60", "--save-s", "0.3", options=("--warm", "marked"))
    wait_for_step(run, 12)
    os.kill(warm_process_of(child), signal.SIGKILL)
    out, err = finish(child, status=0)
    assert out.endswith("finished\n") and "starting again from step_" in err
    assert err.count("the process that forks the ranks has died") == 1
    first, _ = attempts(run)
    for path in first.glob("rank-*.log"):
        assert "stopped at step" in path.read_text(), "the ranks may save before they end"
    out, _ = finish(start(tmp_path / "other", 2, options=("--warm", "thready")), status=0)
    assert out.endswith("finished\n"), "a module that starts threads: the process refuses to fork"
