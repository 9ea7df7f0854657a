"""`python -m train -cn RECIPE [key=value ...]`: train a recipe. Hydra's own command line, with errors that help.

    python -m train -cn smoke                              train the smoke recipe
    python -m train -cn smoke optim.lr=3e-4 precision=bf16     override a field, swap a group
    python -m train -cn smoke --cfg job                    print the composed recipe
    python -m train --config-dir mine -cn my_recipe        your own recipes beside the shipped ones
    torchrun --nproc-per-node 4 -m train -cn smoke parallel.tensor=2 parallel.pipeline=2

Exit status: 0 finished or paused as the recipe asked; 2 a recipe, data, checkpoint or machine that cannot be used; 3 NaN or
infinity in a gradient, a weight, a moment or an evaluation (no such state is saved, earlier checkpoints are intact); 128 + the
signal's number when a signal asked the run to stop (a checkpoint was written).
"""

import contextlib
import os
import signal
import sys

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_command
from recipes.schema.errors import USER_ERRORS
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe


def main() -> int:
    """Entry point of `python -m train` and of the `stratum-train` script."""
    return run_command(_train, program="train", keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _train(composed: DictConfig) -> int:
    recipe = read_recipe(composed)
    from train.run import train  # torch takes seconds: a mistake in the recipe is reported without it

    end = train(recipe)
    if int(os.environ.get("RANK", "0")) == 0:
        if end.reason == "finished":
            from train.record.report import write_report  # likewise, and matplotlib

            write_report(end.folder)
            _say(f"Finished at step {end.step}. Summary: {end.folder}/summary.md, picture: {end.folder}/loss.png")
        else:
            _say(
                f"Stopped at step {end.step} ({end.reason}); the checkpoint is written. The same command continues "
                f"from there."
            )
    if end.reason.startswith("SIG"):
        return 128 + int(getattr(signal, end.reason))
    return 0


def _say(text: str) -> None:
    """To the terminal, which may be closed: that is no failure of the run."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
