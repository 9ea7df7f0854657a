"""`stratum merge`: a new run from the weighted weights of two models or of the checkpoints of one run, or from the moving average
that a checkpoint has."""

import sys
from collections.abc import Sequence
from pathlib import Path

from data.system.imports import collector_paused
from recipes.schema.errors import USER_ERRORS
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser, run_or_path
from recipes.schema.tools import MergeConfig

_ERRORS: tuple[type[Exception], ...] = (*USER_ERRORS, OSError)
_EXAMPLES = """
stratum merge runs/smoke runs/mine --out runs/merged --alpha 0.5
stratum merge runs/smoke runs/mine --out runs/best --alpha 0.3,0.5,0.7 --evaluate heldout --rows 2
stratum merge runs/smoke --out runs/averaged --window 0: --weights minus_sqrt
stratum merge runs/smoke --out runs/averaged --ema
stratum merge runs/adapted --out runs/folded --adapters
"""
_NOTES = """
The sum is computed in fp32, some rows at a time; checkpoints may be of any layout. The new run has weights without optimizer
state, and its lineage. It trains on (stratum train runs/merged), generates and is exported like any run.
Two models or --adapters: training starts at step 0. A window or --ema: training continues at its last step.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum merge`."""
    parser = CommandParser(
        "merge",
        about="Merge two models of one shape, or average checkpoints of one run, into a new run.",
        examples=_EXAMPLES,
        notes=_NOTES,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run (folder or name), import or checkpoint folder")
    parser.add_fields(MergeConfig)
    parsed = parser.parse_args(list(arguments))
    config = parser.fields(MergeConfig, parsed)
    if config.out is None:
        parser.error("--out is missing: name the folder of the new run, such as --out runs/merged.")
    wanted = "--alpha 0.5" if len(parsed.models) > 1 else "--window FROM:TO, --ema or --adapters"
    if len(parsed.models) > 2:
        parser.error(f"two models at most, not {len(parsed.models)}. Merge two, then the result with the third.")
    of_one_run = (config.window is not None) + (config.ema or config.adapters)
    if (config.alpha is None) == (len(parsed.models) == 2) or of_one_run != (len(parsed.models) == 1):
        parser.error(
            f"{len(parsed.models)} model{'s take' if len(parsed.models) > 1 else ' takes'} {wanted} and no other."
        )
    if config.alpha is not None and ("," in config.alpha) != (config.evaluate is not None):
        parser.error("several values of --alpha and --evaluate go together: the best one becomes the new run.")
    if of_one_run and config.evaluate is not None:
        parser.error("--evaluate chooses between values of --alpha. Evaluate an average with `stratum evaluate`.")
    try:
        with collector_paused():
            # importing torch takes seconds; --help and usage errors do not need it
            from train.merge.run_merge import run_merge

        return run_merge(config, [run_or_path(name) for name in parsed.models], Path(config.out))
    except _ERRORS as error:
        return complain(error)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted. Scores of a sweep are kept; the same command continues.\n")
        return 130
