"""The wheel: everything a run needs is in it, and it works in a folder that has the user's own train.py, data/ and recipes/."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recipes", "data", "launch", "train")
HOSTILE = "raise SystemExit('the working directory was imported')\n"


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files alone, without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        if name.split("/")[0] in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        out,
        source,
    ]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_every_tracked_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    needed = {name for name in tracked() if name.split("/")[0] in PACKAGES} - {"launch/setup.sh"}
    assert needed <= names, sorted(needed - names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    assert scripts.split() == ["[console_scripts]", "stratum", "=", "train.stratum:main"]


@pytest.mark.slow
def test_installed_it_trains_in_a_folder_that_would_shadow_it(wheel: Path, tmp_path: Path) -> None:
    """Prepare (two worker processes), train by `launch local` (a child process), generate; recipes from the wheel."""
    target, here = tmp_path / "site", tmp_path / "here"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(pip, check=True)
    here.mkdir()
    for name in ("train.py", "launch.py", "data/__init__.py", "recipes/__init__.py", "recipes/schema/__init__.py"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(HOSTILE)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def stratum(*words: str) -> str:
        done = subprocess.run(
            [target / "bin" / "stratum", *words], cwd=here, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout + done.stderr

    found = subprocess.run(
        [sys.executable, "-P", "-c", "import train; print(train.__file__)"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith(str(target)), found
    small = ["data.sources.python.max_bytes=200000", "data.tokenizer.train_bytes=400000"]
    assert "Prepared runs/data/smoke" in stratum("prepare", "-cn", "smoke", *small)
    short = [
        "run.steps=2",
        "run.global_rows=2",
        "run.microbatch_rows=2",
        "data.row_tokens=64",
        "evaluate.every_steps=0",
    ]
    short += ["evaluate.rows_per_source=2", "schedule.warmup=1", "schedule.decay=1", "telemetry.tensorboard=false"]
    assert "Finished at step 2" in stratum("launch", "local", "-cn", "smoke", *small, *short)
    assert stratum("generate", "smoke", "--prompt", "ROMEO.", "--tokens", "3").startswith("ROMEO.")
    assert "wrote runs/smoke/summary.md" in stratum("report", "smoke")
    assert "installed as a package" in stratum("doctor", "--json")
