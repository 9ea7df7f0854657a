"""From the words of a command line to a typed recipe, composed by Hydra exactly as the trainer does. Imports no torch.

`launch` checks the recipe and passes the same words to the trainer, which composes them again: what was checked is what runs.
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
    """The recipe that `words` compose; or an exit status, if they ask for something else (`--cfg`) or are wrong.

    In that case the output or the message is already printed. notes: gets notes about the composition.
    """
    found: list[Recipe] = []

    def take(composed: Any) -> int:
        found.append(read_recipe(composed))
        if notes is not None and (note := inherited_sources(composed)):
            notes.append(note)  # the composed recipe itself does not show this
        return 0

    status = run_command(take, words, program=program, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)
    return found[0] if found and not status else status


def checked_layout(
    recipe: Recipe, *, processes: int, nodes: int = 1, machine: Machine | None, more: Sequence[Problem] = (), here: bool
) -> Layout:
    """The layout of a recipe with `processes` on each node. Raises RecipeError with everything that is wrong.

    machine: where it runs; None if unknown. more: further problems, found by the launcher. here: whether it starts on this
    machine, so that files that are not on this disk are missing.
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
