"""From the words of a command line to a typed recipe, by Hydra as the trainer reads it; imports no torch.

The words are kept: `launch` checks the recipe they mean and hands the same words to `python -m train`, which composes
them again, so what was checked is what runs.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.runs import RunFolder
from recipes.schema.command import dotted_keys, inherited_sources, run_command
from recipes.schema.errors import USER_ERRORS, RecipeError
from recipes.schema.layout import Layout, lay_out
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe


def split_words(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the words that belong to Hydra. The parser must not allow abbreviations."""
    own, words = parser.parse_known_args(list(arguments))
    sweeps = [word for word in words if word in ("-m", "--multirun")]
    if sweeps:
        parser.error(
            f"{sweeps[0]}: a sweep is not started here; use `python -m train {sweeps[0]}`, or one command for each run"
        )
    return own, words


def compose(words: Sequence[str], *, program: str, notes: list[str] | None = None) -> Recipe | int:
    """The recipe that `words` compose; or an exit status, where they ask for something else or are wrong (and it was said)."""
    found: list[Recipe] = []

    def keep(composed: Any) -> int:
        found.append(read_recipe(composed))
        if notes is not None and (note := inherited_sources(composed)):
            notes.append(note)  # what the composed recipe no longer shows
        return 0

    before = sys.argv
    sys.argv = [program, *words]
    try:
        status = run_command(keep, program=program, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)
    finally:
        sys.argv = before
    return found[0] if found and not status else status


def layout_of(recipe: Recipe, *, processes: int, nodes: int = 1) -> Layout:
    """The layout of a recipe on so many processes a node, all rules checked. RecipeError lists what does not fit."""
    return lay_out(
        model=recipe.model,
        parallel=recipe.parallel,
        run=recipe.run,
        row_tokens=recipe.data.row_tokens,
        world=processes * nodes,
    )


def run_folder(recipe: Recipe) -> RunFolder:
    """Where a recipe's run lies."""
    return RunFolder(Path(recipe.run.folder) / recipe.run.name)


def extra_environment(recipe: Recipe) -> dict[str, str]:
    """`launch.environment` as a mapping. RecipeError for words that are not NAME=VALUE."""
    variables = {}
    for word in shlex.split(recipe.launch.environment):
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier():
            raise RecipeError(
                f"launch.environment={recipe.launch.environment!r}: {word!r} is not NAME=VALUE. "
                f"Write it as in 'launch.environment=\"NCCL_DEBUG=INFO OMP_NUM_THREADS=4\"'."
            )
        variables[name] = value
    return variables
