"""Composes the arguments of a command line into a typed recipe, in the same way as the trainer. Imports no torch.

`launch` checks the recipe and passes the same arguments to the trainer, which composes them again. So the recipe that runs is the
one that was checked.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.facts import prepared_of
from launch.runs import RunFolder
from recipes.schema.command import dotted_keys, inherited_sources, run_command
from recipes.schema.errors import USER_ERRORS, Problem
from recipes.schema.facts import Machine, read_disk
from recipes.schema.layout import Layout, lay_out
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.rules import problems, refuse


def compose(words: Sequence[str], *, program: str, notes: list[str] | None = None) -> Recipe | int:
    """The recipe that the arguments `words` compose, or an exit status if they are wrong or contain `--cfg`.

    With an exit status, the output or the message is already printed. notes: notes about the composition are appended.
    """
    found: list[Recipe] = []

    def take(composed: Any) -> int:
        found.append(read_recipe(composed))
        if notes is not None and (note := inherited_sources(composed)):
            notes.append(note)  # the composed recipe does not show which sources are inherited
        return 0

    status = run_command(take, words, program=program, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)
    return found[0] if found and not status else status


def checked_layout(
    recipe: Recipe, *, processes: int, nodes: int = 1, machine: Machine | None, more: Sequence[Problem] = (), here: bool
) -> Layout:
    """The layout of a recipe with `processes` on each node. Raises RecipeError with all problems.

    machine: of the run; None if unknown. more: further problems that the launcher found. here: whether the run starts on this
    machine, so that a file that is not on this disk is a problem.
    """
    world = processes * nodes
    prepared = prepared_of(recipe)
    here = here or (prepared is not None and prepared.is_here)
    refuse(
        [*problems(recipe, world=world, machine=machine, disk=read_disk(recipe), prepared=prepared, here=here), *more]
    )
    return lay_out(
        model=recipe.model, parallel=recipe.parallel, run=recipe.run, row_tokens=recipe.data.row_tokens, world=world
    )


def run_folder(recipe: Recipe) -> RunFolder:
    """The run folder of a recipe."""
    return RunFolder(Path(recipe.run.folder) / recipe.run.name)
