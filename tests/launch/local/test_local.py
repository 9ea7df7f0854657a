"""`stratum launch local` with real processes and real signals: statuses, restarts, one error once, no orphans, terminals."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_runs import (
    ENVIRONMENT,
    attempts,
    finish,
    none_left,
    ranks_running,
    start,
    wait_for_step,
    wait_until,
)


def test_ranks_get_torchruns_variables_and_separate_logs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    out, err = finish(start(run, 3), status=0)
    assert out == "rank 0 of 3 starts after step 0\nfinished\n", "only rank 0 is shown"
    assert err == ""
    (logs,) = attempts(run)
    assert [p.name for p in sorted(logs.glob("[!.]*"))] == [f"rank-0000{r}.log" for r in range(3)]
    assert (logs / "rank-00000.log").read_text() == out
    assert (logs / "rank-00002.log").read_text() == "rank 2 of 3 starts after step 0\nfinished\n"


def test_all_ranks_can_be_shown_each_line_with_its_rank(tmp_path: Path) -> None:
    out, _ = finish(start(tmp_path / "run", 2, options=("--show", "2")), status=0)
    expected = [f"[{r}] {text}" for r in (0, 1) for text in (f"rank {r} of 2 starts after step 0", "finished")]
    assert sorted(out.splitlines()) == sorted(expected)


def test_the_first_error_shows_once_and_the_run_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    failures = ("--fail", "1:15:raise", "--fail", "0:15:peer", "--fail", "2:15:peer")
    out, err = finish(start(run, 3, "--steps", "30", *failures), status=0)
    assert err.count("ValueError: rank 1 broke at step 15") == 1
    assert "launch: rank 1" in err and "failed first, with status 1:" in err and "Ranks 0, 2 failed after it." in err
    assert "Connection closed" not in out + err, "consequences of the first error stay in the logs"
    assert "runpy" not in err, "the traceback starts in the program"
    assert "failed with status 1 after a new checkpoint was written; starting again from step_00000010 at once" in err
    assert out.endswith("rank 0 of 3 starts after step 10\nfinished\n")
    first, second = attempts(run)
    assert "Connection closed by peer" in (first / "rank-00000.log").read_text()
    assert "starts after step 10" in (second / "rank-00002.log").read_text()


def test_restarts_are_counted_from_the_last_new_checkpoint_and_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    out, err = finish(start(run, 2, "--steps", "30", "--fail", "1:25:kill:always"), status=137)
    assert "rank 1" in err and "SIGKILL (status 137; out of memory?), without a message." in err
    assert [f"restart {n} of 2" in err for n in (1, 2, 3)] == [True, True, False]
    assert "no restart: it failed with SIGKILL (status 137; out of memory?); 2 restarts in a row brought" in err
    assert out.count("starts after step 20") == 3, "one at once, two counted"
    none_left(run)


def test_a_user_error_is_shown_once_and_not_retried(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, err = finish(start(run, 2, "--fail", "1:3:error"), status=2)
    assert err.count("data.folder=nowhere is not there.") == 1
    assert "no restart: the recipe, the data or the machine must be changed first" in err
    assert len(attempts(run)) == 1
    _, err = finish(start(tmp_path / "other", 2, "--fail", "0:3:error"), status=2)
    assert err.startswith("error: no.\nlaunch: rank 0") and "the error above" in err and err.count("error: no.") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_one_signal_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    child = start(run, 2, "--steps", "2000", "--save-s", "0.3")
    wait_for_step(run, 3)
    child.send_signal(number)
    meant = signal.SIGTERM if number == signal.SIGHUP else number
    out, err = finish(child, status=128 + meant)
    assert f"launch: {meant.name}: the processes finish their step, save and stop." in err
    stopped = re.search(r"stopped at step (\d+)", out)
    assert stopped and (run / "checkpoints" / "latest").read_text() == f"step_{int(stopped.group(1)):08d}"
    none_left(run)


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(run, 2, "--steps", "2000", "--fail", "1:5:hang")
    wait_until((run / "failed-1-5-hang").exists)
    child.send_signal(signal.SIGINT)
    time.sleep(0.3)
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = finish(child, status=130)
    assert time.monotonic() - begun < 5 and "again: killed" in err
    none_left(run)


def test_a_kill_after_all_have_saved_says_that_nothing_is_lost(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(run, 2, "--steps", "2000", "--end-s", "60")
    wait_for_step(run, 3)
    child.send_signal(signal.SIGINT)
    wait_until(lambda: "stopped at step" in "".join(p.read_text() for p in (run / "logs").glob("*/rank-00001.log")))
    child.send_signal(signal.SIGINT)
    out, err = finish(child, status=130)
    (step,) = re.findall(r"stopped at step (\d+)", out)
    assert f"SIGINT again: killed. Nothing is lost: the last step, {step}, is saved." in err
    none_left(run)


def test_the_grace_period_comes_from_the_launcher(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(run, 2, "--steps", "2000", "--fail", "1:5:hang", options=("--grace", "1"))
    wait_until((run / "failed-1-5-hang").exists)
    child.send_signal(signal.SIGTERM)
    _, err = finish(child, status=143)
    assert "still running 1 s after the signal (launch.grace_s): killed. The newest checkpoint is" in err
    none_left(run)


def test_no_process_outlives_a_killed_launcher(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(run, 3, "--steps", "2000")
    wait_for_step(run, 3)
    assert len(ranks_running(run)) == 3
    child.kill()
    child.communicate()
    none_left(run)
    assert (run / "checkpoints" / "latest").exists(), "they saved before they ended"


def test_no_restart_after_a_signal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(run, 1, "--fail", "0:1:raise:always", "--steps", "2000")
    wait_until(lambda: list((run / "logs").glob("*/failure-00000.json")))
    child.send_signal(signal.SIGTERM)
    finish(child, status=1)


def test_on_a_terminal_the_process_has_one_too_and_the_log_is_clean(tmp_path: Path) -> None:
    """A program that draws a bar gets a terminal of the real width; its log has the final state of each line."""
    (tmp_path / "bar.py").write_text(
        "import os, sys\n"
        "assert sys.stderr.isatty() and sys.stdout.isatty(), 'no terminal'\n"
        "for i in range(3): sys.stderr.write(f'\\r\\x1b[2K\\x1b[1mstep {i}\\x1b[0m of {os.get_terminal_size(2).columns}')\n"
        "sys.stderr.write('\\ndone\\n')\n"
    )
    program = (
        "import fcntl, termios, struct, sys, time\n"
        "from pathlib import Path\n"
        "from launch.local.supervise import StopRequest, run_attempt\n"
        "fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 77, 0, 0))\n"
        "import os\n"
        "end = run_attempt([sys.executable, '-m', 'launch.local.rank', 'bar'], processes=1, environment=dict(os.environ),\n"
        f"    logs=Path({str(tmp_path / 'logs')!r}), shown=frozenset([0]), grace_s=5, stop=StopRequest(), use_terminal=True)\n"
        "sys.exit(end.status)\n"
    )
    master, slave = pty.openpty()
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{tmp_path}"}
    child = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                seen += os.read(master, 4096)
            except OSError:
                break
        elif child.poll() is not None:
            break
    assert child.wait() == 0, seen.decode()
    assert b"\x1b[1mstep 0" in seen and b"of 77" in seen, "the bar is drawn live"
    assert (tmp_path / "logs" / "rank-00000.log").read_text() == "step 2 of 77\ndone\n"
