"""The set-up script finds a Python that works, whatever broken ones stand before it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "setup.sh"


def find(path: Path, home: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPT), "--find-python"],
        env={"PATH": f"{path}:/usr/bin:/bin", "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_broken_shim_and_an_old_python_are_passed_over(tmp_path: Path) -> None:
    shims, home = tmp_path / "shims", tmp_path / "home"
    executable(shims / "python3.12", "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    executable(shims / "python3.13", "#!/bin/sh\nexit 1\n")
    executable(shims / "python3", "#!/bin/sh\nexit 1\n")
    wanted = home / ".pyenv" / "versions" / "3.12.9" / "bin" / "python"
    executable(wanted, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    found = find(shims, home)
    assert found.returncode == 0, found.stderr
    assert os.path.samefile(found.stdout.strip(), sys.executable)


def test_a_named_python_comes_first(tmp_path: Path) -> None:
    found = find(tmp_path, tmp_path, PYTHON=sys.executable)
    assert os.path.samefile(found.stdout.strip(), sys.executable)


def test_without_any_the_remedy_is_one_clear_message(tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    for name in ("python3", "python3.12", "python3.13"):
        executable(shims / name, "#!/bin/sh\nexit 1\n")
    found = find(shims, tmp_path)
    assert found.returncode == 1
    assert "No Python 3.12 or 3.13" in found.stderr and "make PYTHON=" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
