"""The set-up script finds a working Python, also if broken ones come first."""

import os
import stat
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "launch" / "setup.sh"


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


def test_a_broken_shim_and_an_old_python_are_skipped(tmp_path: Path) -> None:
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


def test_without_a_python_one_message_gives_the_remedy(tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    for name in ("python3", "python3.12", "python3.13"):
        executable(shims / name, "#!/bin/sh\nexit 1\n")
    found = find(shims, tmp_path)
    assert found.returncode == 1
    assert "No Python 3.12 or 3.13" in found.stderr and "make PYTHON=" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def project(folder: Path) -> Path:
    """A project with an environment whose Python records pip's arguments, and works otherwise."""
    for name in ("launch", ".venv/bin", "train"):
        (folder / name).mkdir(parents=True)
    (folder / "launch" / "setup.sh").write_text(SCRIPT.read_text())
    for name in ("pyproject.toml", "constraints.txt", "train/__init__.py"):
        (folder / name).write_text("")
    python = f'#!/bin/sh\nif [ "$2" = pip ]; then echo "pip $*" >> {folder}/calls; exit 0; fi\nexec "{sys.executable}" "$@"\n'
    executable(folder / ".venv" / "bin" / "python", python)
    return folder


def set_up(folder: Path, *, uv: str) -> tuple[list[str], str]:
    """`make setup` there, with this script as uv. -> (arguments of uv and pip, stderr)."""
    executable(folder / "bin" / "uv", f'#!/bin/sh\necho "uv $*" >> {folder}/calls\n{uv}\n')
    environment = {**os.environ, "PATH": f"{folder}/bin:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", folder / "launch" / "setup.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    (folder / "calls").unlink(missing_ok=True)
    return [call for call in calls if "--editable" in call], done.stderr


def test_uv_installs_and_pip_does_if_uv_fails(tmp_path: Path) -> None:
    there = project(tmp_path)
    (there / "bin").mkdir()
    calls, _ = set_up(there, uv="exit 1")
    assert [call.split()[0] for call in calls] == ["uv", "pip"] and "--constraint constraints.txt" in calls[1]
    calls, _ = set_up(there, uv="exit 0")
    assert calls == []  # already installed
    (there / "pyproject.toml").write_text("# changed")
    calls, said = set_up(there, uv="exit 0")
    assert len(calls) == 1 and calls[0].startswith(
        "uv pip install --python .venv/bin/python --constraint constraints.txt"
    )
    assert "pip, which takes longer" not in said


def test_a_new_top_level_package_is_installed_too(tmp_path: Path) -> None:
    """The editable install maps the packages that existed when it was made."""
    there = project(tmp_path)
    (there / "bin").mkdir()
    assert set_up(there, uv="exit 0")[0] and not set_up(there, uv="exit 0")[0]
    (there / "recipes").mkdir()
    (there / "recipes" / "__init__.py").write_text("")
    assert set_up(there, uv="exit 0")[0]
