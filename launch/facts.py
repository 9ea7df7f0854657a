"""Facts about this disk and environment for the rules, before processes are started. No torch."""

import os
from pathlib import Path

from data.store.manifest import MANIFEST
from recipes.schema.data import is_remote
from recipes.schema.facts import Prepared, not_prepared, wants_fp32_block_scales
from recipes.schema.launch_rules import environment_of, environment_problems
from recipes.schema.recipe import Recipe


def prepared_of(recipe: Recipe) -> Prepared | None:
    """Facts about a recipe's prepared data or prompts on this disk; None for data behind a URL."""
    if recipe.objective.kind != "grpo":
        if is_remote(recipe.data.folder):
            return None
        if not (Path(recipe.data.folder) / MANIFEST).is_file():
            return not_prepared(recipe.data.folder)
    # Importing numpy and tokenizers takes a second, and a plan without prepared data does not need them.
    from data.prepared import read_material

    return read_material(recipe, checks=False)


def fp32_block_scales_of(recipe: Recipe) -> bool:
    """Whether the environment of the run's processes makes Transformer Engine use fp32 block scales."""
    words = recipe.launch.environment
    variables = {} if environment_problems(words) else environment_of(words)
    return wants_fp32_block_scales({**os.environ, **variables})
