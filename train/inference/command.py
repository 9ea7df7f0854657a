"""`stratum generate`: stream text from the newest checkpoint of a run, or continue many prompts in one batch."""

import json
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from data.system.imports import collector_paused
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
stratum generate smoke --prompts prompts.txt --n 4               many prompts in one batch, four texts each, as JSON lines
stratum generate runs/tiny_sft --chat --prompt "What is 3 plus 4?"      answer a message, by the recipe's chat template
stratum generate smoke --prompt "ROMEO." --logprobs 5            with the log-probabilities of the tokens, as JSON
stratum generate smoke --speculate lookup --prompts prompts.txt  faster where texts repeat themselves; runs/SMALL: a draft model
stratum generate -cn smoke --checkpoint runs/smoke/checkpoints/step_00000002      an older checkpoint, by its folder
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum generate`."""
    parser = CommandParser(
        "generate",
        about="Stream text from the newest checkpoint of a run, or continue many prompts in one batch.",
        examples=_EXAMPLES,
        recipe=True,
    )
    return run_tool(parser, arguments, GenerateConfig, _generate, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _generate(config: GenerateConfig, composed: DictConfig) -> int:
    recipe = read_recipe(composed)
    with collector_paused():
        # Importing torch takes seconds; errors above are reported before it.
        from train.inference.text import generate_records, stream_text

    if config.prompts is not None or config.n > 1 or config.logprobs is not None:
        for record in generate_records(recipe, config):
            sys.stdout.write(f"{json.dumps(record, ensure_ascii=False)}\n")
        return 0
    for piece in stream_text(recipe, config):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
