"""`stratum replay`: compute one step of a run again and compare every layer with another execution."""

from collections.abc import Sequence

from omegaconf import DictConfig

from data.system.imports import collector_paused
from recipes.schema.command import dotted_keys, run_tool
from recipes.schema.errors import USER_ERRORS
from recipes.schema.options import CommandParser
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.tools import ReplayConfig

_ABOUT = """
Compute one step of a run again: from its newest checkpoint before the step, in this process, whatever the run's layout was.
Prints root mean square and maximum of each layer's output, gradient and new weight, and says whether two executions agree to
the bit, or which tensor is the first that differs. Names the documents of the step.
"""
_EXAMPLES = """
stratum replay runs/smoke --step 2                           twice here: is this machine's arithmetic repeatable?
stratum replay runs/smoke --step 2 --out step2.json          keep the statistics, for another machine
stratum replay runs/smoke --step 2 --against step2.json      compare with those of another machine, or with another run
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum replay`. -> 0 if the executions agree to the bit or to rounding, 1 if they do not."""
    parser = CommandParser("replay", about=_ABOUT, examples=_EXAMPLES, recipe=True)
    return run_tool(parser, arguments, ReplayConfig, _replay, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _replay(config: ReplayConfig, composed: DictConfig) -> int:
    recipe = read_recipe(composed)
    with collector_paused():
        # Start-up cost: importing torch takes seconds; mistakes above are reported without it.
        from train.replay.show import replay

    return replay(recipe, config)
