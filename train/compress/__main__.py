"""`stratum compress score | prune | search | pick`: make a model smaller (docs/compress.md)."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_command
from recipes.schema.compress import CompressConfig
from recipes.schema.errors import USER_ERRORS
from recipes.schema.foreign import printable
from recipes.schema.options import STRATUM, CommandParser
from recipes.schema.recipe import Recipe
from recipes.schema.suggestions import did_you_mean


@dataclass(frozen=True)
class _Command:
    about: str
    examples: str


COMMANDS = {
    "score": _Command(
        "Score the parent's widths and layers on calibration rows, at any layout (also under torchrun), and draw pictures.",
        "stratum compress score -cn tiny_compress",
    ),
    "prune": _Command(
        "Prune the parent to compress.layers, hidden, ffn, ...; writes a checkpoint and a recipe of the smaller shape.",
        "stratum compress prune -cn tiny_compress                          after `score` of the same recipe",
    ),
    "search": _Command(
        "Try shapes within a budget and prune the best ones; prints a command for a short distillation of each.",
        "stratum compress search -cn tiny_compress compress.search_layers=[8,10]",
    ),
    "pick": _Command(
        "Compare the candidates of `search` after their distillation.",
        "stratum compress pick -cn tiny_compress                           after training what `search` printed",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `stratum compress`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in COMMANDS:
        is_help = bool(words) and words[0] in ("-h", "--help")
        (sys.stdout if is_help else sys.stderr).write(_help() if is_help else _unknown(words[0] if words else ""))
        return 0 if is_help else 2
    command = words.pop(0)
    about = f"{COMMANDS[command].about}\nReads and writes the folder `compress.folder`/`run.name`."
    parser = CommandParser(f"compress {command}", about=about, examples=COMMANDS[command].examples, recipe=True)
    _, recipe_words = parser.parse_recipe(words)

    def job(composed: DictConfig) -> int:
        # Importing torch and Megatron takes seconds; a mistake on the command line is reported without them.
        return int(getattr(importlib.import_module("train.compress.commands"), command)(composed))

    keys = [*dotted_keys(Recipe), *(f"compress.{key}" for key in dotted_keys(CompressConfig))]
    return run_command(job, recipe_words, program=f"compress {command}", keys=keys, user_errors=USER_ERRORS)


def _help() -> str:
    lines = [f"  {name:8}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {STRATUM} compress COMMAND [RUN | -cn RECIPE] [key=value ...]",
            "",
            "Make a model smaller (docs/compress.md).",
            "",
            *lines,
            "",
            "examples:",
            *(f"  {command.examples}" for command in COMMANDS.values()),
            "",
        ]
    )


def _unknown(word: str) -> str:
    word = printable(word)
    hint = did_you_mean(word, COMMANDS, otherwise=f"Use one of: {', '.join(COMMANDS)}.")
    return f"error: `{STRATUM} compress {word}`: unknown command. {hint}\n"


if __name__ == "__main__":
    sys.exit(main())
