"""`python -m train.compress COMMAND -cn RECIPE [key=value ...]`: make a model smaller (docs/compress.md).

    score    measure the parent's widths and layers over calibration rows, at any layout (torchrun works); pictures
    prune    cut the parent down to compress.layers, hidden, ffn, ...: a checkpoint and a recipe of the smaller shape
    search   shapes within a budget, the best few pruned, with the command that distils each for a short while
    pick     compare the candidates once they are distilled

All four write into `compress.folder`/`run.name`. Exit status: 0 done, 2 a recipe or checkpoint that cannot be used.
"""

import importlib
import sys

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_command
from recipes.schema.compress import CompressConfig
from recipes.schema.errors import USER_ERRORS
from recipes.schema.recipe import Recipe

COMMANDS = ("score", "prune", "search", "pick")


def main() -> int:
    """Entry point of `python -m train.compress`."""
    words = sys.argv[1:]
    if not words or words[0] not in COMMANDS:
        unknown = f"error: unknown command {words[0]!r}\n" if words and words[0] not in ("-h", "--help") else ""
        sys.stderr.write(f"{unknown}{__doc__}")
        return 0 if words and not unknown else 2
    command = words.pop(0)
    sys.argv[1:] = words

    def job(composed: DictConfig) -> int:
        # Loaded here: torch and Megatron take seconds, and a mistake on the command line is reported without them.
        return int(getattr(importlib.import_module("train.compress.commands"), command)(composed))

    keys = [*dotted_keys(Recipe), *(f"compress.{key}" for key in dotted_keys(CompressConfig))]
    return run_command(job, program=f"train.compress {command}", keys=keys, user_errors=USER_ERRORS)


if __name__ == "__main__":
    sys.exit(main())
