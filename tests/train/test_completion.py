"""Completion in a real bash: commands, options, recipes, fields with their values, runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.completion import main, suggestions

ROOT = Path(__file__).resolve().parents[2]
_LINES = {
    "stratum la": {"launch"},
    "stratum launch ": {"kubernetes", "local", "node", "slurm"},
    "stratum train -cn smo": {"smoke"},
    "stratum train -cn smoke optim.lr": {"optim.lr="},
    "stratum train -cn smoke precision=fp8_b": {"fp8_blockwise"},
    "stratum train -cn smoke telemetry.wandb=of": {"off", "offline"},
    "stratum status --wa": {"--watch"},
    "stratum report mi": {"mine"},
}


def test_words_that_can_stand_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine" / "logs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for line, wanted in _LINES.items():
        assert {word if word.endswith("=") else word.rpartition("=")[2] for word in suggestions(line)} == wanted, line
    assert suggestions("stratum nothing ") == [] and suggestions("stratum train -cn smoke no.such=") == []
    assert {"-cn", "--config-dir"} <= set(suggestions("stratum plan -"))


def test_bash_completes_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the script, as bash calls it when Tab is pressed."""
    assert main(["bash"]) == 0
    (tmp_path / "stratum.bash").write_text(capsys.readouterr().out)
    (tmp_path / "stratum").write_text(f'#!/bin/bash\nexec {sys.executable} -P -m train.stratum "$@"\n')
    (tmp_path / "stratum").chmod(0o755)
    line = "stratum train -cn smoke precision=fp8_b"
    program = (
        f"source stratum.bash; COMP_LINE='{line} more' COMP_POINT={len(line)} _stratum; echo \"${{COMPREPLY[@]}}\""
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fp8_blockwise\n", done.stderr
