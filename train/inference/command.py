"""`stratum generate`: stream text from the newest checkpoint of a run."""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_tool
from recipes.schema.errors import USER_ERRORS
from recipes.schema.options import CommandParser
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.tools import GenerateConfig

_EXAMPLES = """
stratum generate runs/smoke --prompt "ROMEO."                    continue a prompt
stratum generate smoke --prompt "ROMEO." --temperature 0         greedy; `smoke` is looked up in runs/
stratum generate runs/smoke --top-p 0.9 --tokens 40 --seed 7
stratum generate -cn smoke --checkpoint runs/smoke/checkpoints/step_00000002      an older checkpoint, by its folder
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum generate`."""
    parser = CommandParser(
        "generate", about="Stream text from the newest checkpoint of a run.", examples=_EXAMPLES, recipe=True
    )
    return run_tool(parser, arguments, GenerateConfig, _generate, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _generate(config: GenerateConfig, composed: DictConfig) -> int:
    recipe = read_recipe(composed)
    from train.inference.text import stream_text  # importing torch takes seconds; errors above are reported before it

    for piece in stream_text(recipe, config):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
