"""`stratum COMMAND ...`: the command line of this project. It imports only the module of the command that is run.

    words --longest name in COMMANDS--> (module, function) --import--> function(rest of the words) -> exit status

This file and `command_list` import only the standard library, so that `--help` and error messages appear at once.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from recipes.schema.terminal import fitted
from train.command_list import COMMANDS

PACKAGE = "stratum-pretrain"
"""Name of the installed distribution."""


_HEAD = """usage: stratum COMMAND [arguments]

Pretraining of language models built from Mamba-2, attention and MLP layers. A recipe says everything about a run. Name a run by
its folder (runs/smoke) or its name (smoke). Commands that use a recipe also take one: -cn smoke run.name=mine.
"""
_TAIL = """
`stratum COMMAND --help` explains a command, with examples. `stratum --version` shows the versions that matter.

  stratum prepare -cn smoke && stratum train -cn smoke     prepare data, train
  stratum generate runs/smoke --prompt "ROMEO."            text from the newest checkpoint
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `stratum` script. -> the command's exit status; 2 if there is no such command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(fitted(help_text(), sys.stdout))
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        sys.stdout.write(version_text())
        return 0
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    if name is None:
        return _unknown(words)
    module, function = COMMANDS[name].entry.split(":")
    return int(getattr(importlib.import_module(module), function)(words[len(name.split()) :]))


def help_text(of: str = "") -> str:
    """The list of commands, by group. of: list only the commands that start with this text."""
    chosen = {name: command for name, command in COMMANDS.items() if name.startswith(of)}
    width = max(map(len, chosen))
    lines = []
    for group in dict.fromkeys(command.group for command in chosen.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:{width}}  {command.about}" for name, command in chosen.items() if command.group == group]
    if of:
        return "\n".join([f"usage: stratum {of.strip()} COMMAND [arguments]", *lines, ""])
    return "\n".join([_HEAD.rstrip(), *lines, _TAIL])


def version_text() -> str:
    """Versions of this package and of its main libraries, read from metadata without importing them."""
    needed = [f"{name} {_version(name)}" for name in ("torch", "megatron-core", "transformer-engine")]
    return f"stratum {_version(PACKAGE)} ({', '.join(needed)}, Python {sys.version.split()[0]})\n"


def _version(package: str) -> str:
    from importlib import metadata  # a fifth of the start-up of `stratum --help`, and only --version needs it

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _unknown(words: Sequence[str]) -> int:
    """Print an error with the closest command, or list a group's commands. -> exit status."""
    first, *_ = words = [repr(word)[1:-1] for word in words[:2]]  # without control characters
    if any(name.startswith(f"{first} ") for name in COMMANDS):
        second = words[1] if len(words) > 1 else ""
        if second in ("-h", "--help"):
            sys.stdout.write(fitted(help_text(f"{first} "), sys.stdout))
            return 0
        choices = [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
        near = difflib.get_close_matches(second, choices, n=1, cutoff=0.5)
        hint = f"Did you mean `stratum {first} {near[0]}`?" if near else f"Use one of: {', '.join(choices)}."
        problem = f"there is no command `stratum {first} {second}`" if second else f"`stratum {first}` needs a command"
    else:
        near = difflib.get_close_matches(first, [*COMMANDS, "launch"], n=1, cutoff=0.5)
        if not near:  # the second word of a command, as in `local`
            near = [name for name in COMMANDS if name.endswith(f" {first}")]
        hint = f"Did you mean `stratum {near[0]}`?" if near else f"There are: {', '.join(COMMANDS)}."
        problem = f"there is no command `stratum {first}`"
    sys.stderr.write(f"error: {problem}. {hint}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
