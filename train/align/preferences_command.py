"""`stratum preferences`: draw answers to prompts from a run, judge them, and write the best and the worst as preferences."""

from collections.abc import Sequence

from omegaconf import DictConfig

from data.system.imports import collector_paused
from recipes.schema.command import dotted_keys, run_tool
from recipes.schema.errors import USER_ERRORS, RecipeError
from recipes.schema.options import CommandParser
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.tools import PreferencesConfig

_EXAMPLES = """
stratum preferences runs/tiny_sft --prompts judged.jsonl --out pairs.jsonl --samples 8 --tokens 32
"""
_NOTES = """
A record of --prompts has messages (or a prompt), a verifier such as {"kind": "number"}, and what it needs, such as target.
Answers are drawn with seeds of their own, so the same command gives the same records; after a kill it continues.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum preferences`."""
    parser = CommandParser(
        "preferences",
        about="Draw answers to prompts from a run, judge them, and write the best and the worst of each prompt as preferences.",
        examples=_EXAMPLES,
        notes=_NOTES,
        recipe=True,
    )
    return run_tool(parser, arguments, PreferencesConfig, _write, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _write(config: PreferencesConfig, composed: DictConfig) -> int:
    for name in ("prompts", "out"):
        if getattr(config, name) is None:
            raise RecipeError(f"--{name} is missing. Name the file, such as --prompts judged.jsonl --out pairs.jsonl.")
    recipe = read_recipe(composed)
    with collector_paused():
        # Importing torch takes seconds; errors above are reported before it.
        from train.align.on_policy import write_preferences

    return write_preferences(recipe, config)
