"""How a process of this project is started: Python, a module of ours, and no look at the working directory.

`python -m NAME` puts the working directory in front of everything that is installed, so a user's own `train.py`, `data/` or
`recipes/` there would be run instead of ours. `-P` leaves it out.
"""

import sys
from pathlib import Path

from recipes.schema.options import FRONT

PYTHON_FLAGS = ("-P",)
"""Flags of every Python that runs a module of ours."""


def checkout() -> str | None:
    """The folder of our packages if this is a checkout; None if they are installed. A container may have neither."""
    folder = Path(__file__).resolve().parents[1]
    return str(folder) if (folder / "pyproject.toml").is_file() else None


def python_module(module: str, *words: str) -> list[str]:
    """The command that runs a module with the Python of this process."""
    return [sys.executable, *PYTHON_FLAGS, "-m", module, *words]


def stratum(*words: str) -> list[str]:
    """The command `stratum WORDS`, of the installation this process belongs to."""
    return python_module(FRONT, *words)
