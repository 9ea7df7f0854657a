"""One style of options for every command: `stratum COMMAND [RUN | -cn RECIPE] [key=value ...] [--option value ...]`.

    arguments --CommandParser--> the command's own options, and arguments for Hydra (recipe, overrides)

A tool's options are the fields of a dataclass (`recipes.schema.tools`), which gives name, type, range, default and help text.
A run is named by its folder or by its name in `runs/`. Its `recipe.yaml` is then composed like any recipe, so that its fields
can be overridden.
"""

import argparse
import dataclasses
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from recipes.schema.errors import RecipeError
from recipes.schema.messages import complain
from recipes.schema.run_folder import how_to_import
from recipes.schema.suggestions import did_you_mean
from recipes.schema.terminal import fitted
from recipes.schema.typed import FieldError, build, field_docs

STRATUM = "stratum"
"""Name of the command that the package installs."""
FRONT = "train.stratum"
"""Module of the command, for processes that are started by module name."""
RUNS = Path("runs")
"""Folder in which a run is looked up by its name alone."""
RECIPE_FILE = "recipe.yaml"
"""File in a run folder: the complete recipe with which the run was last started."""

_RECIPE_HELP = """
recipe:
  RUN                   a run, by its folder (runs/smoke) or its name (smoke, in runs/); its own recipe is used
  -cn NAME              a recipe by its name (--config-name)
  key=value             override a field (optim.lr=3e-4) or swap a group (precision=bf16). +key=value adds a key that the
                        recipe does not have yet, ~key removes one. `stratum fields` explains all fields
  --config-dir FOLDER   a folder with recipes and groups of your own, in addition to the shipped ones
  --cfg job             print the composed recipe and do nothing else; --resolve also fills in references
"""
_SWEEP_HELP = """\
  -m                    a sweep: one run for each value of a list (optim.lr=1e-3,3e-4), in a folder each (--multirun)
"""


def hand_over(*words: str) -> NoReturn:
    """Replace this process with `stratum WORDS`. Older ways to start a command use it."""
    safe_path = ["-P"] if sys.flags.safe_path else []
    os.execv(sys.executable, [sys.executable, *safe_path, "-m", FRONT, *words])


class CommandParser(argparse.ArgumentParser):
    """The parser of one command: help with examples and defaults, errors with suggestions, no abbreviations.

    recipe: the command composes a recipe. It then takes RUN, -cn and overrides, and `parse_recipe` parses it.
    """

    def __init__(
        self,
        prog: str | None = None,
        *,
        about: str = "",
        examples: str = "",
        notes: str = "",
        recipe: bool = False,
        sweeps: bool = False,
        **kwargs: Any,
    ) -> None:
        parts = [
            (_RECIPE_HELP + (_SWEEP_HELP if sweeps else "")).strip("\n") if recipe else "",
            f"examples:\n{_indented(examples)}" if examples else "",
            notes.strip("\n"),
        ]
        usage = f"{STRATUM} {prog} [RUN | -cn RECIPE] [key=value ...] [options]" if recipe else None
        super().__init__(
            prog=prog if prog is None or prog.startswith(STRATUM) else f"{STRATUM} {prog}",
            usage=usage,
            description=about.strip("\n"),
            epilog="\n\n".join(part for part in parts if part),
            formatter_class=_Help,
            allow_abbrev=False,
            **kwargs,
        )
        self._takes_sweeps = sweeps
        if recipe:
            hidden = argparse.SUPPRESS  # _RECIPE_HELP explains them, together with the overrides
            self.add_argument("words", nargs="*", help=hidden)
            self.add_argument("-cn", "--config-name", help=hidden)
            self.add_argument("-cd", "--config-dir", help=hidden)
            self.add_argument("-c", "--cfg", nargs="?", const="job", choices=("job", "hydra", "all"), help=hidden)
            self.add_argument("--resolve", action="store_true", help=hidden)
            self.add_argument("-p", "--package", help=hidden)
            self.add_argument("-m", "--multirun", action="store_true", help=hidden)

    def print_help(self, file: Any = None) -> None:
        """Print the help, fitted to the terminal."""
        stream = sys.stdout if file is None else file
        stream.write(fitted(self.format_help(), stream))

    def add_fields(self, cls: type) -> None:
        """An option for each field of a dataclass."""
        docs, hints = field_docs(cls), typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            option, help = option_of(field.name), docs[field.name]
            if hints[field.name] is bool:
                self.add_argument(option, dest=field.name, action="store_true", help=help)
                continue
            shown = repr(field.default) if isinstance(field.default, str) else field.default
            if field.default is not None:
                help = f"{help} (default: {shown})".replace("%", "%%")
            self.add_argument(option, dest=field.name, metavar=_metavar(hints[field.name]), help=help)

    def fields[T](self, cls: type[T], parsed: argparse.Namespace) -> T:
        """The dataclass with the given options. Ends the command if a value is not valid for its field."""
        hints = typing.get_type_hints(cls, include_extras=True)
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        given = {
            name: _typed(hints[name], getattr(parsed, name)) for name in names if getattr(parsed, name) is not None
        }
        try:
            return build(cls, given, "")
        except FieldError as error:
            self.error(
                "\n".join(re.sub(r"^\w+(?==)", lambda m: option_of(m[0]), line) for line in str(error).splitlines())
            )

    def parse_recipe(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """(the command's own options, arguments for Hydra). Ends the command if they are wrong."""
        parsed = self.parse_intermixed_args(list(arguments))
        if parsed.multirun and not self._takes_sweeps:
            self.error(f"-m: this command has no sweeps. Use `{STRATUM} train -m`, or one command for each run.")
        try:
            return parsed, _hydra_words(parsed)
        except RecipeError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Print one message with a remedy, and end with exit status 2."""
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        choice = re.search(r"invalid choice: '([^']*)'(?: \(choose from (.*)\))?", message)
        if unknown:
            word = next(iter(unknown[1].split()), "")
            options = [name for name in self._option_string_actions if name.startswith("--")]
            hint = did_you_mean(word.split("=")[0], options, otherwise=f"`{self.prog} --help` lists the options.")
            message = f"unknown {'option' if word.startswith('-') else 'word'} {unknown[1] or repr(unknown[1])}. {hint}"
        elif choice and choice[2]:
            choices = [name.strip("' ") for name in choice[2].split(",")]
            message = f"{message}. {did_you_mean(choice[1], choices, otherwise='')}".rstrip()
        raise SystemExit(complain(message))


def run_named(name: str) -> Path:
    """The folder of a run: `name` itself, or `runs/name`. RecipeError if neither is a run."""
    if not name.strip():
        raise RecipeError(f"{name!r} is not the name of a run. Name a folder like runs/NAME, or NAME.")
    candidates = [Path(name), *([RUNS / name] if "/" not in name.rstrip("/") else [])]
    for path in candidates:
        if is_run(path):
            return path
    if foreign := how_to_import(Path(name)):
        raise RecipeError(foreign)
    known = sorted(path.name for path in RUNS.iterdir() if is_run(path)) if RUNS.is_dir() else []
    hint = did_you_mean(Path(name).name, known, otherwise=f"In runs/: {', '.join(known) or 'none'}.")
    raise RecipeError(f"{name} is not a run: neither it nor runs/{Path(name).name} has {RECIPE_FILE} or logs. {hint}")


def run_or_path(name: str) -> Path:
    """The path `name`, or `runs/name` if only that exists. For commands that also take a checkpoint or an export."""
    path = Path(name)
    return RUNS / path if not path.exists() and "/" not in name and is_run(RUNS / name) else path


def is_run(path: Path) -> bool:
    """Whether a folder has files of a run."""
    # os.path returns False for names that are too long or contain a NUL, where Path raises.
    return os.path.isfile(path / RECIPE_FILE) or os.path.isdir(path / "logs") or os.path.isdir(path / "checkpoints")


def option_of(field: str) -> str:
    """The option of a field: `top_k` -> `--top-k`."""
    return f"--{field.replace('_', '-')}"


def options_of(cls: type) -> list[str]:
    """The options that `add_fields` makes, for suggestions when a user wrote a key instead."""
    return [option_of(field.name) for field in dataclasses.fields(cls)]


def _hydra_words(parsed: argparse.Namespace) -> list[str]:
    overrides = [word for word in parsed.words if _is_override(word)]
    runs = [word for word in parsed.words if not _is_override(word)]
    words: list[str] = []
    if len(runs) > 1:
        raise RecipeError(f"{len(runs)} runs are named: {', '.join(runs)}. Name one. Write an override as key=value.")
    if runs and (parsed.config_name or parsed.config_dir):
        raise RecipeError(
            f"{runs[0]!r} names a run, and -cn or --config-dir a recipe. Give only one of them. Write an override as key=value."
        )
    if runs:
        words += _recipe_of_run(runs[0])
    if parsed.config_dir:
        words.append(f"--config-dir={parsed.config_dir}")
    if parsed.config_name:
        words += ["-cn", parsed.config_name]
    words += overrides
    if parsed.cfg:
        words += ["--cfg", parsed.cfg]
    if parsed.package:
        words += ["--package", parsed.package]
    return [*words, *["--resolve"] * parsed.resolve, *["--multirun"] * parsed.multirun]


def _recipe_of_run(name: str) -> list[str]:
    """Arguments for Hydra that compose the recipe of a run, also if its folder was moved."""
    try:
        folder = run_named(name)
    except RecipeError as error:
        is_recipe = "/" not in name and (Path(__file__).parent.parent / f"{name}.yaml").is_file()
        hint = f" For the recipe of this name: -cn {name}." if is_recipe else ""
        raise RecipeError(f"{error}{hint}") from error
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"{folder} has no {RECIPE_FILE}: the run has not started yet. Name its recipe: -cn NAME.")
    if not folder.name or folder.name == "..":
        folder = folder.resolve()
    place = (f"run.folder={folder.parent}", f"run.name={folder.name}")  # recipes.schema.command quotes texts for Hydra
    return [f"--config-dir={folder}", "-cn", Path(RECIPE_FILE).stem, *place]


def _is_override(word: str) -> bool:
    if word.startswith("~"):
        return True
    # The runs of a sweep have names such as smoke-optim.lr=0.001.
    return "=" in word and not any(os.path.isfile(path / RECIPE_FILE) for path in (Path(word), RUNS / word))


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    inner = [a for a in typing.get_args(hint) if a is not type(None)]
    if inner:
        return _metavar(inner[0])
    return {int: "N", float: "NUMBER", str: "TEXT"}[hint]


def _typed(hint: Any, value: Any) -> Any:
    """An argument as an int if its field is one and it can be read as one. Otherwise `build` reports it."""
    is_whole = isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value) is not None
    return int(value) if _metavar_or_flag(hint) == "N" and is_whole else value


def _metavar_or_flag(hint: Any) -> str:
    return "" if hint is bool else _metavar(hint)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip("\n").splitlines())


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help with its own line breaks, and the default of each option that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24, width=118)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        has_default = action.default not in (None, False, argparse.SUPPRESS) and bool(action.option_strings)
        return f"{text} (default: %(default)s)" if text and has_default and "default" not in text else text
