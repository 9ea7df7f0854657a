"""From the words of a command line to a typed recipe, by Hydra as the trainer reads it; imports no torch.

The words are kept: `launch` checks the recipe they mean and hands the same words to the trainer, which composes
them again, so what was checked is what runs.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.runs import RunFolder
from recipes.schema.command import dotted_keys, run_command
from recipes.schema.errors import USER_ERRORS, RecipeError
from recipes.schema.layout import Layout, lay_out
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe


def compose(words: Sequence[str], *, program: str) -> Recipe | int:
    """The recipe that `words` compose; or an exit status, where they ask for something else or are wrong (and it was said)."""
    found: list[Recipe] = []

    def keep(composed: Any) -> int:
        found.append(read_recipe(composed))
        return 0

    status = run_command(keep, words, program=program, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)
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
