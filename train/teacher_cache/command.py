"""`stratum teacher-cache`: store a teacher's answers once, so that training from them needs no teacher."""

from collections.abc import Sequence

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_tool
from recipes.schema.errors import USER_ERRORS
from recipes.schema.options import CommandParser
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.tools import TeacherCacheConfig

_ABOUT = """
Ask the teacher once. It reads every row that the recipe trains on (each once, however often it is drawn), and its most
likely tokens (objective.top_k) at every position are stored in objective.teacher_cache, with the mass of the rest. Training
from that folder then needs no teacher. Killed, the same command continues.
"""
_EXAMPLES = """
stratum teacher-cache -cn tiny_distill objective.teacher_cache=runs/answers objective.top_k=64
stratum teacher-cache -cn tiny_distill objective.teacher_cache=runs/half objective.top_k=64 --values float16
stratum teacher-cache -cn tiny_distill objective.teacher_cache=runs/answers objective.top_k=64 --student runs/tiny_teacher
"""
_NOTES = """
On several processes each whole teacher takes blocks of rows of its own: `torchrun ... -m train.stratum teacher-cache ...`.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum teacher-cache`."""
    parser = CommandParser("teacher-cache", about=_ABOUT, examples=_EXAMPLES, notes=_NOTES, recipe=True)
    return run_tool(parser, arguments, TeacherCacheConfig, _fill, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _fill(config: TeacherCacheConfig, composed: DictConfig) -> int:
    recipe = read_recipe(composed)
    from train.teacher_cache.fill import fill  # torch takes seconds: mistakes above are reported without it

    fill(recipe, config)
    return 0
