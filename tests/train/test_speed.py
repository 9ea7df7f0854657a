"""`train/speed.py`: a recipe's step without data or run folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_it_needs_no_data_and_leaves_no_files(tmp_path: Path) -> None:
    words = [
        "-cn",
        "nemotron_h_tiny",
        "model.pattern=M-*-",
        "model.vocab=512",
        "run.global_rows=2",
        "run.microbatch_rows=1",
    ]
    words += ["data.row_tokens=64", "precision=fp8_current", "precision.high_precision_last=0", "run.threads=1"]
    done = subprocess.run(
        [sys.executable, "-m", "train.speed", *words, "--steps", "2"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["step_s"]) == 2 and found["backend"] == "emulated" and "fp8_current" in found["precision"]
    assert found["tokens_per_s"] == pytest.approx(128 / sorted(found["step_s"])[0], rel=1) and 0 < found["mfu"] < 1
    assert found["losses"][0] == pytest.approx(6.24, abs=0.2)  # ln 512
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob("checkpoints"))
