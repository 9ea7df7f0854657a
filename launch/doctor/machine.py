"""How `stratum doctor` reads a machine: files, programs, installed packages. Standard library only; runs on Python 3.8."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"tzdata": ("win32", "emscripten"), "colorama": ("win32",)}
"""Packages that only these systems need (values of sys.platform); constraints.txt is for all systems."""
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()
"""If false, this is an installed package, without the files of the project's top folder."""
SETUP = "run `make setup` (2 to 5 minutes)" if IS_CHECKOUT else "`pip check` lists what is missing; install it with pip"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    what: str
    state: str
    """`ok`; `absent`: missing, but not always needed; `wrong`: something will fail."""
    found: str
    remedy: str = ""


class Machine:
    """The machine that is checked; a test gives another root and PATH."""

    def __init__(self, root: Path = Path("/"), project: Path = ROOT) -> None:
        self.root = root
        self.project = project

    def read(self, path: str) -> str:
        """A small file of the system; "" if it cannot be read."""
        try:
            return _plain((self.root / path).read_text(errors="replace")).strip()
        except OSError:
            return ""

    def run(self, *words: str) -> str | None:
        """What a program prints, without control characters; None if it is missing or fails."""
        program = shutil.which(words[0])
        if program is None:
            return None
        try:
            done = subprocess.run(
                [program, *words[1:]], capture_output=True, text=True, errors="replace", timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return _plain(done.stdout).strip() if done.returncode == 0 else None

    def packages(self) -> dict[str, str]:
        """Installed versions, in the project's environment if it has one, else in this Python's."""
        own = sorted(self.project.glob(".venv/lib/python3.*/site-packages"))
        found = metadata.distributions(path=[str(path) for path in own]) if own else metadata.distributions()
        return {plain_name(str(one.metadata["Name"])): one.version for one in found if one.metadata["Name"]}

    def torch_cuda(self) -> str | None:
        """The CUDA version torch was built with, read without importing it."""
        folders = [*self.project.glob(".venv/lib/python3.*/site-packages"), *map(Path, sys.path)]
        for folder in folders:
            path = folder / "torch" / "version.py"
            if path.is_file():
                found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", path.read_text(), re.MULTILINE)
                return found[1] if found else None
        return None


def pins(machine: Machine) -> dict[str, str]:
    """Tested versions by name: of constraints.txt, and the exact ones of the `gpu` extra."""
    found = {}
    for line in project_file(machine, "constraints.txt").splitlines():
        name, sign, version = line.partition("==")
        if sign and not line.startswith("#"):
            found[plain_name(name)] = version.split()[0]
    for name, version in re.findall(r"\"([\w-]+)(?:\[\w+\])?==([\w.]+)\"", project_file(machine, "pyproject.toml")):
        found[plain_name(name)] = version
    return found


def project_file(machine: Machine, name: str) -> str:
    """A file of the project's top folder; "" if it does not exist."""
    path = machine.project / name
    return path.read_text() if path.is_file() else ""


def package(topic: str, name: str, pin: str | None, have: str | None, *, missing: str, remedy: str = SETUP) -> Finding:
    """The line of one package. missing: its state if it is not installed."""
    if have is None:
        return Finding(topic, name, missing, f"not installed{f' (pinned {pin})' if pin else ''}", remedy)
    if pin is not None and have.split("+")[0] != pin:
        return Finding(topic, name, "wrong", f"{have}, pinned {pin}", SETUP + ": it installs what was tested")
    return Finding(topic, name, "ok", have)


def plain_name(name: str) -> str:
    """A package's name in the form that indexes compare."""
    return name.lower().replace("_", "-").replace(".", "-")


def _plain(text: str) -> str:
    """Text for a terminal: control characters except line breaks and tabs become `?`."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)
