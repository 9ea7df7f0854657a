"""`python -m train.generate -cn RECIPE`: stream text from the newest checkpoint of a recipe's run.

python -m train.generate -cn smoke +generate.prompt="ROMEO."
python -m train.generate -cn smoke +generate.temperature=0            greedy
python -m train.generate -cn smoke +generate.top_p=0.9 +generate.tokens=400 +generate.seed=7
python -m train.generate -cn smoke +generate.checkpoint=runs/smoke/checkpoints/step_00000120
"""

import sys

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_command, section
from recipes.schema.errors import USER_ERRORS, RecipeError
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.tools import GenerateConfig
from recipes.schema.typed import FieldError, build


def main() -> int:
    """Entry point of `stratum generate`."""
    return run_command(_generate, program="train.inference.command", keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _generate(composed: DictConfig) -> int:
    try:
        config = build(GenerateConfig, section(composed, "generate"), "generate")
    except FieldError as error:
        raise RecipeError(str(error)) from error
    recipe = read_recipe(composed)
    from train.inference.text import stream_text  # torch takes seconds: mistakes above are reported without it

    for piece in stream_text(recipe, config):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
