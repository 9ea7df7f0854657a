"""What `stratum doctor` asks of a machine, and how it answers. Standard library only, readable by Python 3.8."""

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
"""Packages that only these systems need (values of sys.platform): the pins are for all."""
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()
"""Otherwise this is an installed package, without the files of the project's top folder."""
SETUP = "run `make setup` (2 to 5 minutes)" if IS_CHECKOUT else "`pip check` lists what is missing; install it with pip"


@dataclass(frozen=True)
class Finding:
    """One line."""

    topic: str
    what: str
    state: str
    """`ok`; `absent`: not there, and not needed for everything; `wrong`: something will fail."""
    found: str
    remedy: str = ""


class Machine:
    """What is asked of the machine; a test gives another root and PATH."""

    def __init__(self, root: Path = Path("/"), project: Path = ROOT) -> None:
        self.root = root
        self.project = project

    def read(self, path: str) -> str:
        """A small file of the system; empty where it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def run(self, *words: str) -> str | None:
        """What a program prints; None where it is not there or fails."""
        program = shutil.which(words[0])
        if program is None:
            return None
        try:
            done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

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
    """Tested versions by name: constraints.txt, and the exact ones of the `gpu` extra."""
    found = {}
    for line in project_file(machine, "constraints.txt").splitlines():
        name, sign, version = line.partition("==")
        if sign and not line.startswith("#"):
            found[plain_name(name)] = version.split()[0]
    for name, version in re.findall(r"\"([\w-]+)(?:\[\w+\])?==([\w.]+)\"", project_file(machine, "pyproject.toml")):
        found[plain_name(name)] = version
    return found


def project_file(machine: Machine, name: str) -> str:
    """A file of the project's top folder; empty where there is none."""
    path = machine.project / name
    return path.read_text() if path.is_file() else ""


def package(topic: str, name: str, pin: str | None, have: str | None, *, missing: str, remedy: str = SETUP) -> Finding:
    """The line of one package. missing: its state where it is not installed."""
    if have is None:
        return Finding(topic, name, missing, f"not installed{f' (pinned {pin})' if pin else ''}", remedy)
    if pin is not None and have.split("+")[0] != pin:
        return Finding(topic, name, "wrong", f"{have}, pinned {pin}", SETUP + ": it installs what was tested")
    return Finding(topic, name, "ok", have)


def plain_name(name: str) -> str:
    """A package's name as indexes compare it."""
    return name.lower().replace("_", "-").replace(".", "-")
