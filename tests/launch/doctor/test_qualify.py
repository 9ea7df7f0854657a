"""`stratum doctor --qualify`: its schedule, and how it runs pieces that fail, hang, crash or have no time. Real processes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.children import stratum
from launch.doctor.pieces import Options, Piece, Result
from launch.doctor.qualify import run, schedule
from launch.doctor.qualify_report import Reporter

ROOT = Path(__file__).resolve().parents[3]


def options_in(folder: Path, **changes: object) -> Options:
    made = Options(folder / "out", budget_minutes=9, rehearse=True, gpus=0, missing=("transformer-engine", "mamba-ssm"))
    return replace(made, **changes)  # type: ignore[arg-type]


def piece(name: str, program: str, *, limit: float = 1, **more: object) -> Piece:
    return Piece(name, "a test", (sys.executable, "-c", program), limit, **more)  # type: ignore[arg-type]


def ran(pieces: list[Piece], options: Options) -> dict[str, Result]:
    return {result.name: result for result in run(pieces, options, Reporter(options))}


def holding(path: Path) -> str:
    """A program that starts a process of its own, and hangs. Both hold a lock on the file until they end."""
    return (
        f"import fcntl, subprocess, time; stream = open({str(path)!r}, 'w'); fcntl.flock(stream, fcntl.LOCK_EX); "
        "subprocess.Popen(['sleep', '60'], pass_fds=[stream.fileno()]); print('holds it', file=stream, flush=True); "
        "time.sleep(60)"
    )


def wait_until_free(path: Path) -> None:
    """Fails if a process still holds the file's lock after ten seconds. Killed processes need a moment to end."""
    assert path.read_text() == "holds it\n", "the piece ended before its own process was there"
    with path.open() as stream:
        for _ in range(200):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                return
    raise AssertionError("a process that a piece started is still there")


def test_pieces_that_fail_do_not_stop_the_next_ones(tmp_path: Path) -> None:
    held = tmp_path / "held"
    options = options_in(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    found = ran(
        [
            piece("raises", "raise ValueError('this | is why')"),
            piece("crashes", "import os; os.kill(os.getpid(), 11)"),
            piece("hangs", holding(held), limit=0.05),
            piece("needs", "1/0", needs="a second GPU"),
            piece("works", 'print(\'{"tokens_per_s": 1234.5, "backend": "te"}\')'),
            piece("long", "pass", limit=1000),
        ],
        options,
    )
    assert {name: one.state for name, one in found.items()} == {
        "raises": "failed", "crashes": "failed", "hangs": "out of time", "needs": "left out", "works": "passed",
        "long": "not started",
    }  # fmt: skip
    assert "this | is why" in found["raises"].tail and found["crashes"].reason == "signal 11"
    wait_until_free(held)
    assert signal.getsignal(signal.SIGTERM) is before
    stored = json.loads((options.folder / "report.json").read_text())
    assert [one["state"] for one in stored["pieces"]] == [one.state for one in found.values()]
    text = (options.folder / "report.md").read_text()
    assert "| hangs | out of time | 3 |" in text and "this | is why" in text and "needs a second GPU" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_schedule_leaves_no_process_behind(number: signal.Signals, tmp_path: Path) -> None:
    held = tmp_path / "held"
    pid = os.fork()
    if pid == 0:
        ran([piece("sleeps", holding(held)), piece("next", "pass")], options_in(tmp_path))
        os._exit(0)
    for _ in range(400):
        if held.exists() and held.read_text():
            break
        time.sleep(0.05)
    os.kill(pid, number)
    os.waitpid(pid, 0)
    wait_until_free(held)
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["state"] for one in stored["pieces"]] == ["failed", "not started"]


def test_a_refused_recipe_and_skipped_tests_are_no_failures(tmp_path: Path) -> None:
    step = (sys.executable, "-P", "-m", "train.speed", "-cn", "smoke", "parallel.tensor=3")
    test = tmp_path / "test_on_a_gpu.py"
    test.write_text("import pytest\n\n\n@pytest.mark.skip('needs a GPU')\ndef test_it(): ...\n")
    skipped = (sys.executable, "-P", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(test))
    found = ran(
        [Piece("step", "", step, 4, plan=("-cn", "smoke")), Piece("tests", "", skipped, 4)], options_in(tmp_path)
    )
    assert found["step"].state == "refused" and "parallel.tensor=3" in found["step"].reason, found["step"]
    assert found["step"].planned["tokens_per_s_per_gpu"] > 0
    assert found["tests"].state == "skipped" and "needs a GPU" in found["tests"].tail, found["tests"]


def test_without_transformer_engine_only_its_tests_are_left_out(tmp_path: Path) -> None:
    left_out = {one.name for one in schedule(options_in(tmp_path, rehearse=False, gpus=1)) if one.needs}
    names = {"delayed", "current", "blockwise", "mxfp8", "nvfp4"}
    assert left_out == {f"tests: {name}" for name in names} | {"two ranks"}
    assert not [one for one in schedule(options_in(tmp_path, rehearse=False, gpus=2, missing=())) if one.needs]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--qualify", "--dry-run"], 0, "step: layers of Nano 12B, fp8_blockwise"),
        (["--qualify", "--folder", "{folder}"], 1, "no GPU can be used"),
        (["--rehearse"], 2, "belong to --qualify"),
    ],
)
def test_the_command(words: list[str], status: int, text: str, tmp_path: Path) -> None:
    done = subprocess.run(
        stratum("doctor", *[word.format(folder=tmp_path) for word in words]), capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == status and text in done.stdout + done.stderr, done
    assert list(tmp_path.iterdir()) == []
