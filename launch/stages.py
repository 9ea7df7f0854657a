"""The stages of a recipe (`stages:`): commands that run one after the other, each with the output of the one before.

    stages --> arguments of each command --> printed | run in order; finished stages are recognised and skipped

After a kill, the same command continues: existing scores and pruned checkpoints are used, and training resumes. A stage starts
only after the one before has ended and has trained to its last step. Ctrl-C, SIGTERM and SIGUSR1 are passed to the running
stage, which saves and stops; a second signal kills it.
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

LINKS = ("run.name", "run.start_from", "model")
"""Keys by which stages find each other's runs. The command line cannot set one value for all stages."""
STAGE_FIRST = ("compress.parent",)
"""Keys for which a stage's own value wins over the command line."""


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str
    module: str
    words: list[str]

    @property
    def run_name(self) -> str | None:
        """Name of the run that it trains, if its arguments set one; else None."""
        names = [word.removeprefix("run.name=") for word in self.words if word.startswith("run.name=")]
        return names[-1] if names else None


def stages_of(composed: DictConfig) -> list[Stage]:
    """A recipe's stages with the overrides of the command line. RecipeError for an invalid stage or a wrong override."""
    stages = section(composed, "stages")
    if not stages:
        raise RecipeError("this recipe has no stages. Use a recipe with a section `stages:`, such as tiny_compress.")
    _, overrides = recipe_and_overrides()
    found = [_stage(name, text, overrides) for name, text in stages.items()]
    given = {_key(word) for word in overrides}
    for key in LINKS:
        set_by_stages = dict.fromkeys(w for text in stages.values() for w in shlex.split(str(text)) if _key(w) == key)
        if key in given and set_by_stages:
            raise RecipeError(
                f"{key} must not be given on the command line, because the stages set it and find each other by it "
                f"({', '.join(set_by_stages)}). To separate two attempts, use run.folder and compress.folder."
            )
    return found


def run_stages(composed: DictConfig, stages: Iterable[Stage]) -> int:
    """Run stages in order. -> 0, or the status of the stage that failed; also 0 if a stage paused (run.stop_after_steps)."""
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
            incomplete = (
                _incomplete(Path(recipe.run.folder) / (stage.run_name or recipe.run.name))
                if stage.module == "train"
                else ""
            )
            if incomplete:
                sys.stderr.write(
                    f"stage {stage.name} {incomplete}. The stages after it were not started. The same command continues it.\n"
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
            f"stages.{name} starts with {(words or [''])[0]!r}. Write a stage as `train ...` or `compress COMMAND ...`."
        )
    folders = [word.removeprefix("--config-dir=") for word in words if word.startswith("--config-dir=")]
    kept_keys = {_key(word) for word in words if _key(word) in STAGE_FIRST}
    given = [word for word in overrides if _key(word) not in kept_keys]
    replaced = {_key(word) for word in given}  # keys that the command line sets instead of the stage
    rest = [word for word in words if not word.startswith("--config-dir=") and _key(word) not in replaced]
    return Stage(name, module, [*command, *recipe_words(folders[0] if folders else None), *rest, *given])


def _line(stage: Stage) -> str:
    words = map(without_credentials, stage.words)
    return shlex.join([STRATUM, stage.module.removeprefix("train.").split(".")[-1], *words])


def _key(word: str) -> str:
    return word.split("=", 1)[0].lstrip("+")


def _incomplete(run: Path) -> str:
    """The state of an incomplete run, for messages; "" if it is complete."""
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
    parser.add_argument("--run", action="store_true", help="run them; finished stages are skipped")
    own, words = parser.parse_recipe(arguments)

    def job(composed: DictConfig) -> int:
        stages = stages_of(composed)
        if own.run:
            return run_stages(composed, stages)
        show_stages(stages)
        return 0

    keys = [*dotted_keys(Recipe), *(f"compress.{key}" for key in dotted_keys(CompressConfig))]
    return run_command(job, words, program="stages", keys=keys, user_errors=USER_ERRORS)
