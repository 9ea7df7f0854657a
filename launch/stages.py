"""The stages of a recipe (`stages:`): commands one after the other, each of which reads what the one before wrote.

    stages --> words of each command --> printed | run: begin at the first, what is done already is found done

Killed at any moment, the same command continues: scores and pruned checkpoints that are there are used, training resumes.
A stage begins only when the one before has ended, and trained to its last step. Ctrl-C, SIGTERM and SIGUSR1 go to the
running stage, which saves as ever; a second one kills it.
"""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.children import python_module
from launch.local.supervise import StopRequest, run_attempt
from launch.runs import RunFolder
from recipes.schema import units
from recipes.schema.command import dotted_keys, recipe_and_overrides, recipe_words, run_command, section
from recipes.schema.compress import CompressConfig
from recipes.schema.credentials import without_credentials
from recipes.schema.errors import USER_ERRORS, RecipeError
from recipes.schema.options import STRATUM, CommandParser
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe

CHAIN = ("run.name", "run.start_from", "model")
"""What stages call their runs and find each other by: the command line cannot give all of them one value."""
OWN = ("compress.parent",)
"""What a stage's own words keep saying: the command line's value is for the stages that say nothing of it."""


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str
    module: str
    words: list[str]

    @property
    def run_name(self) -> str | None:
        """What it trains; None where it trains nothing or its recipe says the name."""
        names = [word.removeprefix("run.name=") for word in self.words if word.startswith("run.name=")]
        return names[-1] if names else None


def stages_of(composed: DictConfig) -> list[Stage]:
    """A recipe's stages with the words of the command line. RecipeError for a stage that is none, or words that break them."""
    stages = section(composed, "stages")
    if not stages:
        raise RecipeError("this recipe has no stages.")
    _, overrides = recipe_and_overrides()
    found = [_stage(name, text, overrides) for name, text in stages.items()]
    asked = {_key(word) for word in overrides}
    for key in CHAIN:
        said = dict.fromkeys(w for text in stages.values() for w in shlex.split(str(text)) if _key(w) == key)
        if key in asked and said:
            raise RecipeError(
                f"{key} on the command line: the stages say it themselves and find each other by it ({', '.join(said)}). To "
                f"keep two attempts apart use run.folder and compress.folder."
            )
    return found


def run_stages(composed: DictConfig, stages: Iterable[Stage]) -> int:
    """Run them in order. -> 0, or the status of the stage that did not end well; 0 too where one paused as it was asked."""
    recipe = read_recipe(composed)
    logs = Path(recipe.run.folder) / f"stages-{units.stamp()}-{os.getpid()}"
    with StopRequest() as stop:
        for number, stage in enumerate(stages, 1):
            sys.stdout.write(f"# {stage.name}\n{_line(stage)}\n")
            sys.stdout.flush()
            end = run_attempt(
                python_module("launch.local.rank", stage.module, *stage.words),
                processes=1,
                environment={**os.environ, "PYTHONUNBUFFERED": "1"},
                logs=logs / f"{number:02}",
                shown=frozenset([0]),
                grace_s=recipe.launch.grace_s,
                stop=stop,
                use_terminal=recipe.telemetry.progress and sys.stdout.isatty() and sys.stderr.isatty(),
            )
            if end.status:
                sys.stderr.write(f"error: stage {stage.name} ended with status {end.status}\n")
                return end.status
            left = (
                _left(Path(recipe.run.folder) / (stage.run_name or recipe.run.name)) if stage.module == "train" else ""
            )
            if left:
                sys.stderr.write(
                    f"stage {stage.name} {left}; the stages after it wait. The same command continues it.\n"
                )
                return 0
    return 0


def show_stages(stages: Iterable[Stage]) -> None:
    """Print the commands."""
    for stage in stages:
        sys.stdout.write(f"# {stage.name}\n{_line(stage)}\n")


def _stage(name: str, text: Any, overrides: list[str]) -> Stage:
    words = shlex.split(str(text))
    module = "train"
    command: list[str] = []
    if words[:1] == ["compress"] and len(words) > 1:
        module, command, words = "train.compress", [words[1]], words[2:]
    elif words[:1] == ["train"]:
        words = words[1:]
    else:
        raise RecipeError(
            f"stages.{name} starts with {(words or [''])[0]!r}; a stage is `train ...` or `compress COMMAND ...`."
        )
    folders = [word.removeprefix("--config-dir=") for word in words if word.startswith("--config-dir=")]
    own = {_key(word) for word in words if _key(word) in OWN}
    given = [word for word in overrides if _key(word) not in own]
    asked = {_key(word) for word in given}  # what the command line says instead of a stage's own words
    rest = [word for word in words if not word.startswith("--config-dir=") and _key(word) not in asked]
    return Stage(name, module, [*command, *recipe_words(folders[0] if folders else None), *rest, *given])


def _line(stage: Stage) -> str:
    words = map(without_credentials, stage.words)
    return shlex.join([STRATUM, stage.module.removeprefix("train.").split(".")[-1], *words])


def _key(word: str) -> str:
    return word.split("=", 1)[0].lstrip("+")


def _left(run: Path) -> str:
    """How far a run is from its last step, for people; empty where it is there."""
    folder = RunFolder(run)
    if folder.newest_checkpoint() is None:
        return f"left no checkpoint in {run}"
    step, steps = folder.checkpoint_step(), folder.total_steps()
    return f"paused at step {step:,} of {steps:,}" if steps is not None and step < steps else ""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum stages`: print the stages' commands, or run them."""
    parser = CommandParser(
        "stages",
        about="The stages of a recipe (score, prune, distil, ...): print their commands, or run them one after the other.",
        examples="""
stratum stages -cn tiny_compress                                print the commands
stratum stages -cn tiny_compress run.folder=runs/mine compress.folder=runs/mine/compress --run      run them
""",
        recipe=True,
    )
    parser.add_argument("--run", action="store_true", help="run them; what is done already is found done")
    own, words = parser.parse_recipe(arguments)

    def job(composed: DictConfig) -> int:
        stages = stages_of(composed)
        if own.run:
            return run_stages(composed, stages)
        show_stages(stages)
        return 0

    keys = [*dotted_keys(Recipe), *(f"compress.{key}" for key in dotted_keys(CompressConfig))]
    return run_command(job, words, program="stages", keys=keys, user_errors=USER_ERRORS)
