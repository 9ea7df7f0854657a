"""Runs of `launch local` with simulated trainers (tests/simulated_train.py): starting, waiting, looking for processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from recipes.schema.run_folder import last_metrics

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "drive_local.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def command(run: Path, processes: int, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, str(DRIVER), *options, str(run), str(processes), "--", *words]


def start(run: Path, processes: int, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(run, processes, *words, options=options),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup's SIG_IGN would be inherited
    )


def finish(child: subprocess.Popen[str], *, status: int) -> tuple[str, str]:
    out, err = child.communicate(timeout=60)
    assert child.returncode == status, f"{out}\n{err}"
    return out, err


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.01)


def wait_for_step(run: Path, step: int) -> None:
    wait_until(lambda: any(line["step"] >= step for line in last_metrics(run / "metrics.jsonl")))


def ranks_running(run: Path) -> list[int]:
    """Process ids of all ranks of a run on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"launch.local.rank" in words and str(run).encode() in words:
                found.append(int(folder.name))
    return found


def none_left(run: Path) -> None:
    wait_until(lambda: not ranks_running(run))


def attempts(run: Path) -> list[Path]:
    return sorted((run / "logs").glob("local-*"), key=lambda p: p.stat().st_mtime)
