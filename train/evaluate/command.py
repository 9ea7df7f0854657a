"""`stratum evaluate`: score a checkpoint on tasks, or find the training documents that contain texts of the tasks.

torch and the harness are imported after the command line is checked.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.system.imports import collector_paused
from data.system.parent import end_with_parent
from recipes.schema.errors import USER_ERRORS
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser, run_or_path
from recipes.schema.tools import EvaluateToolConfig

_ERRORS: tuple[type[Exception], ...] = (*USER_ERRORS, OSError)
_EXAMPLES = """
stratum evaluate runs/smoke --tasks needle-1k,multikey-1k --items 2
stratum evaluate smoke --tasks needle-1k --items 2 --resume        skips finished tasks
torchrun --nproc-per-node 2 -m train.stratum evaluate smoke --tasks needle-1k --items 2 --out runs/by_two
stratum evaluate --contamination runs/data/smoke --tasks needle-1k --items 2     documents that contain the tasks' texts
"""
_NOTES = """
tasks:
  needle-1k ... -128k   a number hidden in a long text; also multikey-, tracking-, words- (made from --seed, as in RULER)
  mine.yaml             your own: cloze, multiple choice, exact match, generation with a verifier, whole texts
  human-eval            164 functions to complete; runs what the model wrote, so it needs --run-code
  reasoning/NAME        a generator of reasoning-gym, with its verifier
reward models take no tasks: `stratum evaluate RUN --heldout 64` gives accuracy and calibration on held-out preferences.
docs/evaluate.md explains task files, metrics and intervals.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum evaluate`."""
    parser = CommandParser(
        "evaluate",
        about="Score a run's newest checkpoint (or a checkpoint folder) on tasks, with confidence intervals.",
        examples=_EXAMPLES,
        notes=_NOTES,
    )
    parser.add_argument("place", nargs="?", metavar="RUN_OR_FOLDER", help="run (folder or name), or checkpoint folder")
    parser.add_fields(EvaluateToolConfig)
    parsed = parser.parse_args(list(arguments))
    config = parser.fields(EvaluateToolConfig, parsed)
    if config.tasks is None and config.harness is None and not config.heldout:
        parser.error(
            "name the tasks: --tasks needle-1k,mine.yaml (of a reward model: --heldout 64). --help lists them."
        )
    if config.heldout and (config.tasks is not None or config.harness is not None or config.contamination is not None):
        parser.error(
            "--heldout is for reward models, which take no tasks: leave out --tasks, --harness and --contamination."
        )
    if config.contamination is None and parsed.place is None:
        parser.error("name a run or a checkpoint: stratum evaluate runs/smoke --tasks needle-1k.")
    if config.contamination is not None and (parsed.place is not None or config.harness is not None):
        parser.error(
            "--contamination searches prepared data for the texts of --tasks: leave out the run and --harness."
        )
    rank = int(os.environ.get("RANK", "0"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    try:
        with collector_paused():
            # importing torch takes seconds; --help and usage errors do not need it
            from train.evaluate.evaluation import evaluate_checkpoint, search_data

        if config.contamination is not None:
            return search_data(config, Path(config.contamination))
        return evaluate_checkpoint(config, run_or_path(parsed.place))
    except _ERRORS as error:
        return complain(error, head="error" if rank == 0 else f"error on rank {rank}")
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted. Finished tasks are in results.json; --resume continues.\n")
        return 130
