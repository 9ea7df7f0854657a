"""`python -m train.teacher_cache.command -cn RECIPE objective.teacher_cache=FOLDER objective.top_k=K`: ask the teacher once.

The teacher reads every row the recipe trains on (each once, however often it is drawn) and its K most likely tokens at
every place are kept, with the mass of the rest. Training from FOLDER then needs no teacher. Runs on any number of
processes (torchrun), each whole teacher taking its own blocks of rows; killed, the same command continues.

    python -m train.teacher_cache.command -cn tiny_distill objective.teacher_cache=runs/answers objective.top_k=64
    +cache.values=float16          half the size of the log-probabilities
    +cache.student=runs/mine       also measure what smaller k lose, with this student
"""

import sys

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_command, section
from recipes.schema.errors import USER_ERRORS, RecipeError
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.tools import TeacherCacheConfig
from recipes.schema.typed import FieldError, build


def main() -> int:
    """Entry point of `stratum teacher-cache`."""
    return run_command(_fill, program="train.teacher_cache.command", keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _fill(composed: DictConfig) -> int:
    try:
        config = build(TeacherCacheConfig, section(composed, "cache"), "cache")
    except FieldError as error:
        raise RecipeError(str(error)) from error
    recipe = read_recipe(composed)
    from train.teacher_cache.fill import fill  # torch takes seconds: mistakes above are reported without it

    fill(recipe, config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
