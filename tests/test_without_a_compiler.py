"""A machine without a C compiler and with empty caches: prepare, train, resume and generate as commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WARNING = "no C compiler found"
SMALL = ("run.global_rows=2", "run.microbatch_rows=2", "data.row_tokens=64", "checkpoint.every_steps=1")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has no program at all, and whose caches are new folders."""
    (tmp_path / "bin").mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "STRATUM_NATIVE")}
    caches = ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return kept | dict.fromkeys(caches, str(tmp_path / "cache")) | {"PATH": str(tmp_path / "bin")}


@pytest.mark.slow
def test_every_step_from_text_to_text_works(bare: dict[str, str], tmp_path: Path) -> None:
    """It trains on, says once in each process what is slower, and never inside the text that is generated."""

    def stratum(*words: str) -> subprocess.CompletedProcess[str]:
        # stdout and stderr in one stream, as on a terminal: their order is part of what is tested.
        done = subprocess.run(
            [sys.executable, "-m", "train.stratum", *words], cwd=tmp_path, env=bare, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done

    assert stratum("prepare", "-cn", "smoke").stdout.count(WARNING) <= 1
    first = stratum("train", "-cn", "smoke", *SMALL, "run.steps=1").stdout
    assert first.count(WARNING) == 1 and "kernels plain torch" in first and "several times slower" in first
    again = stratum("train", "-cn", "smoke", *SMALL, "run.steps=2", "checkpoint.allow=[arithmetic]").stdout
    assert "step 2/2" in again and again.count(WARNING) == 1
    text = stratum("generate", "runs/smoke", "--prompt", "ROMEO.", "--tokens", "4").stdout
    assert text.count(WARNING) == 1 and text.index(WARNING) < text.index("\nROMEO.")
    assert list((tmp_path / "cache").rglob("*.so")) == []  # nothing was compiled
