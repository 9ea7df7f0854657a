"""`stratum teacher-cache`: compute teacher logits once, so that training from them needs no teacher."""

from collections.abc import Sequence

from omegaconf import DictConfig

from data.system.imports import collector_paused
from recipes.schema.command import dotted_keys, run_tool
from recipes.schema.errors import USER_ERRORS
from recipes.schema.options import CommandParser
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.tools import TeacherCacheConfig

_ABOUT = """
Run the teacher once over every row that the recipe trains on. For each position its most likely tokens (objective.top_k)
and the mass of the rest are stored in objective.teacher_cache. A row that is drawn several times is stored once. Training
from that folder then needs no teacher. After a kill, the same command continues.
"""
_EXAMPLES = """
stratum teacher-cache -cn tiny_distill objective.teacher_cache=runs/logits objective.top_k=64
stratum teacher-cache -cn tiny_distill objective.teacher_cache=runs/half objective.top_k=64 --values float16
stratum teacher-cache -cn tiny_distill objective.teacher_cache=runs/logits objective.top_k=64 --student runs/tiny_teacher
"""
_NOTES = """
With several processes, each complete teacher computes its own blocks of rows: `torchrun ... -m train.stratum teacher-cache ...`.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum teacher-cache`."""
    parser = CommandParser("teacher-cache", about=_ABOUT, examples=_EXAMPLES, notes=_NOTES, recipe=True)
    return run_tool(
        parser, arguments, TeacherCacheConfig, _write_cache, keys=dotted_keys(Recipe), user_errors=USER_ERRORS
    )


def _write_cache(config: TeacherCacheConfig, composed: DictConfig) -> int:
    recipe = read_recipe(composed)
    with collector_paused():
        # Start-up cost: importing torch takes seconds; mistakes above are reported without it.
        from train.teacher_cache.write_cache import write_cache

    write_cache(recipe, config)
    return 0
