"""How launchers start processes: command lines and environment variables.

`python -m NAME` searches the working directory before installed packages. A user's own `train.py`, `data/` or `recipes/` there
would then run instead of ours. `-P` turns this off.
"""

import sys
from pathlib import Path

from recipes.schema.options import FRONT
from recipes.schema.recipe import Recipe

PYTHON_FLAGS = ("-P",)
"""Flags of every Python process that runs a module of this project."""


def checkout() -> str | None:
    """The folder of our packages if they run from a checkout; None if they are installed. A container needs it mounted."""
    folder = Path(__file__).resolve().parents[1]
    return str(folder) if (folder / "pyproject.toml").is_file() else None


def python_module(module: str, *words: str) -> list[str]:
    """The command that runs a module with this process's Python."""
    return [sys.executable, *PYTHON_FLAGS, "-m", module, *words]


def rank_environment(recipe: Recipe, *, threads: int | None) -> dict[str, str]:
    """Environment variables that every process of a run needs. threads: CPU threads of a process; None does not set them."""
    variables = {"PYTHONUNBUFFERED": "1"}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    if recipe.parallel.tensor > 1 or recipe.parallel.context > 1:
        # Megatron's overlap of communication with matrix products needs the GPU to start kernels in launch order.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return variables


def stratum(*words: str) -> list[str]:
    """The command `stratum WORDS` of this installation."""
    return python_module(FRONT, *words)
