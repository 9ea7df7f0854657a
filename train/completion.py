"""`stratum completion bash|zsh`: a script that lets a shell complete commands, options, recipes, fields and runs.

line up to the cursor --suggestions--> words that can stand there
"""

import contextlib
import importlib
import io
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from recipes.schema.command import RECIPES, dotted_keys
from recipes.schema.messages import complain
from recipes.schema.options import RUNS, CommandParser, is_run
from recipes.schema.recipe import Recipe
from recipes.schema.typed import type_at
from train.command_list import COMMANDS

_BASH = """_stratum() {
  local IFS=$'\\n'
  COMPREPLY=($(stratum completion suggest "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -o default -F _stratum stratum
"""
_ZSH = """#compdef stratum
_stratum() {
  local -a found
  found=("${(@f)$(stratum completion suggest --whole "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
  compadd -S '' -a found
  [[ -n $found ]] || _files
}
compdef _stratum stratum
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum completion`."""
    parser = CommandParser(
        "completion",
        about="Print a script for your shell. It completes commands, options, recipes, runs, and fields with their values.",
        examples="""
stratum completion bash > ~/.local/share/bash-completion/completions/stratum
stratum completion zsh > ~/.zfunc/_stratum                 with fpath+=~/.zfunc before compinit in ~/.zshrc
""",
    )
    parser.add_argument("shell", choices=[*_SCRIPTS, "suggest"], help="the shell; `suggest` is what the script calls")
    parser.add_argument("line", nargs="?", help="with `suggest`: the line up to the cursor")
    parser.add_argument("--whole", action="store_true", help="with `suggest`: whole words, also after `=`")
    parsed = parser.parse_args(arguments)
    if parsed.shell != "suggest":
        sys.stdout.write(_SCRIPTS[parsed.shell])
        return 0
    if parsed.line is None:
        return complain("`stratum completion suggest` needs the line to complete.")
    found = suggestions(parsed.line)
    if not parsed.whole:  # for bash a word begins after `=`
        found = [word if word.endswith("=") else word.rpartition("=")[2] for word in found]
    sys.stdout.write("".join(f"{word}\n" for word in found))
    return 0


def suggestions(line: str) -> list[str]:
    """Words that can stand at the end of a line whose last word may be begun."""
    *before, current = line.lstrip().split(" ")
    before = [word for word in before[1:] if word]
    name = next((name for name in (" ".join(before[:2]), *before[:1]) if name in COMMANDS), None)
    if name is None:
        found = [one.split()[len(before)] for one in COMMANDS if one.split()[: len(before)] == before]
    elif current.startswith("-"):
        found = _options(name)
    elif before[-1] in ("-cn", "--config-name"):
        found = _recipes()
    elif "=" in current:
        key = current.partition("=")[0]
        found = [f"{key}={value}" for value in _values(key)]
    else:
        found = _runs() + ([f"{key}=" for key in (*dotted_keys(Recipe), *_groups())] if "-cn" in _options(name) else [])
    return sorted({word for word in found if word.startswith(current)})


def _options(name: str) -> list[str]:
    """Options of a command, from its help."""
    module, function = COMMANDS[name].entry.split(":")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), function)(["--help"])
    return re.findall(r"(?<![\w-])-{1,2}[a-z][a-z-]*", shown.getvalue())


def _recipes() -> list[str]:
    return [path.stem for path in RECIPES.glob("*.yaml")]


def _groups() -> list[str]:
    return [path.name for path in RECIPES.iterdir() if any(path.glob("*.yaml"))]


def _runs() -> list[str]:
    folders = [path for path in RUNS.iterdir() if is_run(path)] if RUNS.is_dir() else []
    return [text for path in folders for text in (path.name, str(path))]


def _values(key: str) -> list[str]:
    """Names of a group's options, or the values of a field that has few."""
    group = RECIPES / key
    if Path(key).name == key and group.is_dir():
        return [path.stem for path in group.glob("*.yaml")]
    kind = type_at(Recipe, key)
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in typing.get_args(kind)] if typing.get_origin(kind) is typing.Literal else []
