"""`stratum train`, and `-m train` for torchrun: train a recipe.

Exit status: 0 finished, or paused at run.stop_after_steps; 2 a recipe, data, checkpoint or machine that cannot be used; 3 NaN
or infinity in a gradient, a weight, a moment or an evaluation (such a state is not saved, earlier checkpoints are intact); 4 a
rank computed or stored wrong numbers (run.integrity; suspects.jsonl in the run's folder names its host);
128 + the signal's number if a signal stopped the run (a checkpoint was written).
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from data.system.imports import collector_paused
from data.system.parent import end_with_parent
from recipes.schema.command import dotted_keys, run_command
from recipes.schema.errors import USER_ERRORS, StratumError
from recipes.schema.options import CommandParser
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe

_EXAMPLES = r"""
stratum train -cn smoke                                         train the smoke recipe; the same command resumes
stratum train -cn smoke run.name=mine optim.lr=3e-4 precision=bf16      override fields, swap a group
stratum train -cn smoke --cfg job                               print the composed recipe
stratum train -cn smoke -m optim.lr=1e-3,3e-4                   a sweep: one run for each value
stratum train runs/smoke                                        continue a run by its folder
torchrun --nproc-per-node 4 -m train -cn smoke parallel.tensor=2 parallel.pipeline=2
"""
_NOTES = """
Several processes: `stratum launch local`, `stratum launch slurm`, or torchrun as above. Ctrl-C, SIGTERM and SIGUSR1 save at the
end of the step. Exit status: 0 finished, or paused at run.stop_after_steps; 2 a recipe, data, checkpoint or machine that
cannot be used; 3 NaN or infinity; 4 a rank gave wrong numbers (run.integrity); 128 + the signal's number if a signal stopped the
run (a checkpoint was written).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `stratum train` and of the module that torchrun starts."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_torchrun()
    parser = CommandParser(
        "train", about="Train a recipe in this process, or as one rank of torchrun.", examples=_EXAMPLES, notes=_NOTES,
        recipe=True, sweeps=True,
    )  # fmt: skip
    _, words = parser.parse_recipe(sys.argv[1:] if arguments is None else arguments)
    return run_command(_train, words, program="train", keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def follow_torchrun() -> None:
    """Let this process save and stop whenever torchrun ends."""
    # SIGUSR1 and SIGKILL end torchrun without a signal to its processes: with this they get SIGTERM, save and stop.
    end_with_parent()
    # torchrun handles SIGHUP even under nohup, and kills its processes 30 s after passing it on. They inherit nohup's
    # "ignore", so without this line they would train on until that kill.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _train(composed: DictConfig) -> int:
    recipe = read_recipe(composed)
    with collector_paused():
        from train.run import train  # importing torch takes seconds; errors in the recipe are reported before it

    end = train(recipe)
    if int(os.environ.get("RANK", "0")) == 0:
        if end.reason == "finished":
            from train.report.files import write_files  # needed only at the end of a run, on one rank

            try:
                write_files(end.folder)
            except (StratumError, OSError) as error:  # e.g. a full disk: the run itself is finished and saved
                _say(f"Finished at step {end.step}. No summary: {error} To write it: stratum report {end.folder}")
            else:
                _say(f"Finished at step {end.step}. Look at {end.folder}/report.html; summary: {end.folder}/summary.md")
        else:
            _say(
                f"Stopped at step {end.step} ({end.reason}); the checkpoint is written. The same command continues "
                f"from there."
            )
    if end.reason.startswith("SIG"):
        return 128 + int(getattr(signal, end.reason))
    return 0


def _say(text: str) -> None:
    """Print to the terminal. If it is closed, that is not a failure of the run."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
