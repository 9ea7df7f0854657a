"""Stages that are killed: the same command continues where they stopped, and no stage starts before the previous one ended."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pruning_folder import lay_out, shell
from ranks import run_ranks

from data import prepare as _prepare  # noqa: F401  here, so that the processes forked below need not import it
from launch.children import stratum
from launch.stages import _incomplete
from recipes.schema.checkpoint_steps import checkpoint_at
from recipes.schema.run_folder import METRICS, read_metrics
from train import run as _assembly  # noqa: F401  likewise

ROOT = Path(__file__).resolve().parents[3]
STEPS = 400
STAGES = f"""
stages:
  score: compress score run.name=cut compress.layers=3
  prune: compress prune run.name=cut compress.layers=3 compress.ffn=32
  first: >-
    train --config-dir=${{compress.folder}}/cut model=cut run.name=first run.start_from=${{compress.folder}}/cut run.steps={STEPS}
    objective=distill objective.teacher=${{compress.parent}} evaluate.every_steps=0 checkpoint.every_steps=0
    telemetry.log_every_steps=1
  second: >-
    train --config-dir=${{compress.folder}}/cut model=cut run.name=second run.start_from=${{run.folder}}/first run.steps=2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    lay_out(root, stages=STAGES)
    for command in ("prepare", "train"):
        _run(root, command, "-cn", "little")
    return root


def _run(root: Path, *words: str) -> None:
    ((status, text),) = run_ranks(1, shell, root, list(words))
    assert status == 0, text


@pytest.mark.slow
def test_killed_and_stopped_stages_go_on(folder: Path) -> None:
    first = folder / "runs" / "first"

    def is_past(step: int) -> Callable[[], bool]:
        return lambda: _steps(first) > step

    status, text = _stages(folder, until=is_past(3), send=signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and "stage first ended with status 143" in text
    saved = checkpoint_at(first)[1]
    assert 3 < saved.step < STEPS and not (folder / "runs" / "second").exists()
    assert saved.lineage["kept"]["layers"] and saved.lineage["started_from"] == "cut/cut/checkpoints/step_00000000"
    assert saved.lineage["teacher"]["checkpoint"] == "runs/parent/checkpoints/step_00000002"

    status, _ = _stages(folder, until=is_past(saved.step + 3), send=signal.SIGKILL)
    assert status == -signal.SIGKILL
    saved = checkpoint_at(first)[1]
    assert saved.step < STEPS, "the run ended too early for this test to say anything"

    status, text = _stages(folder)
    assert status == 0 and f"resumed after step {saved.step}" in text
    assert "already has these scores" in text and "exists already" in text
    done, second = (checkpoint_at(folder / "runs" / name)[1] for name in ("first", "second"))
    assert done.step == STEPS and second.lineage["started_from_fingerprint"] == done.fingerprint
    assert second.lineage["kept"] == saved.lineage["kept"] and "teacher" not in second.lineage


def test_a_run_that_paused_has_steps_incomplete(folder: Path) -> None:
    _run(folder, "train", "-cn", "little", "run.name=paused", "run.stop_after_steps=1")
    assert _incomplete(folder / "runs" / "paused") == "paused at step 1 of 2"
    assert _incomplete(folder / "runs" / "parent") == ""
    assert "left no checkpoint" in _incomplete(folder / "runs" / "nothing")


def _stages(
    root: Path, *, until: Callable[[], bool] = lambda: False, send: signal.Signals | None = None
) -> tuple[int, str]:
    """Run the stages in a separate process and send it a signal after an event. -> (status, output)."""
    words = ["stages", "-cn", "little", "--config-dir", "recipes", "--run"]
    log = root / "stages.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            stratum(*words),
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _wait(lambda: process.poll() is not None or until(), log)
        children = _children(process.pid) if process.poll() is None else []
        if send is not None:
            process.send_signal(send)
        _wait(lambda: process.poll() is not None and not any(map(_runs, children)), log)
    return process.wait(), log.read_text()


def _wait(is_over: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not is_over():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _steps(run: Path) -> int:
    path = run / METRICS
    if not path.exists():
        return 0
    return max((line["step"] for line in read_metrics(path) if line["kind"] == "step"), default=0)
