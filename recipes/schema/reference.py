"""`stratum fields [GROUP ...]`: every recipe field with its default, range and meaning: paragraphs on a terminal, else Markdown.

docs/recipes.md is its output (`stratum fields > docs/recipes.md`), and a test compares the two.
"""

import dataclasses
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any

from recipes.schema.compress import CompressConfig
from recipes.schema.data import PhaseConfig, SourceConfig
from recipes.schema.fields import Range
from recipes.schema.options import CommandParser
from recipes.schema.recipe import Recipe
from recipes.schema.suggestions import did_you_mean
from recipes.schema.terminal import fitted
from recipes.schema.typed import field_docs

_HEAD = """# Recipe fields

Made by `stratum fields` from the texts under the fields in `recipes/schema/`.
A recipe is YAML composed by Hydra from these parts, where a later part overrides an earlier one: the defaults below, the groups
it lists (`recipes/GROUP/*.yaml`), the recipe itself, the command line. YAML contains only what differs from a default, so that
`recipes/precision/fp8_blockwise.yaml` shows what blockwise *is*. `stratum train -cn smoke --cfg job` prints the whole recipe.

- Swap a group with `precision=bf16`, override any field with `optim.lr=3e-4`.
- The value of a text field is used as written (`launch.container.image=registry#name:tag`). Quote it for the shell only.
- Your own recipes and groups are in a folder of your own: `stratum train --config-dir mine -cn my_recipe`. They inherit the
  defaults automatically. `defaults: [smoke, _self_]` inherits a whole recipe.
- `data.sources={mine: {path: words}}` on the command line replaces the recipe's sources; `data.sources.mine.path=words`
  adds one. A recipe that inherits another one adds its sources to the inherited ones (`stratum plan` names them). With
  `defaults: [smoke, data/no_sources, _self_]` it has only its own.
- `schedule.warmup` and `schedule.decay` below 1 are fractions of the run, so that `run.steps=20` alone shortens a run.
"""


_COLUMNS = ["field", "type", "default", "meaning"]


def page(groups: Sequence[str] = ()) -> str:
    """The Markdown page of some groups; by default of all."""
    parts = [_HEAD]
    for field in dataclasses.fields(Recipe):
        if groups and field.name not in groups:
            continue
        assert isinstance(field.type, type)
        parts.append(_table(field.name, field.type))
        if field.name == "data":
            parts.append(_table("data.sources.NAME", SourceConfig))
            parts.append(_table("data.phases[i]", PhaseConfig))
    if not groups or "compress" in groups:
        parts.append(_table("compress", CompressConfig))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `stratum fields`."""
    names = [*(field.name for field in dataclasses.fields(Recipe)), "compress"]
    parser = CommandParser(
        "fields",
        about="Every recipe field with its type, range, default and meaning; as Markdown in files and pipes.",
        examples="""
stratum fields                                      all of them (docs/recipes.md)
stratum fields optim schedule                       two groups
""",
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"only these: {', '.join(names)}")
    groups = parser.parse_args(arguments).groups
    for group in groups:
        if group not in names:
            hint = did_you_mean(group, names, otherwise="")
            parser.error(f"there is no group {group!r}. {hint} Use one of {', '.join(names)}.".replace("  ", " "))
    text = page(groups)
    sys.stdout.write(fitted(without_tables(text), sys.stdout) if sys.stdout.isatty() else text)
    return 0


def without_tables(text: str) -> str:
    """The page with each line of its tables as a paragraph, for terminals: no terminal is wide enough for the meanings."""
    lines = []
    for line in text.split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|", 3)] if line.startswith("|") else []
        if not cells:
            lines.append(line)
        elif not set("".join(cells)) <= {"-"} and cells != _COLUMNS:
            name, kind, default, meaning = cells
            lines += [f"{name.strip('`')}: {kind}{f', default {default}' if default else ''}", f"    {meaning}", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _table(place: str, cls: type) -> str:
    docs, hints = field_docs(cls), typing.get_type_hints(cls, include_extras=True)
    lines = [
        f"## {place}",
        "",
        (cls.__doc__ or "").strip(),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---|---|---|---|",
    ]
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            lines += [
                f"| `{field.name}.{inner.name}` | {_type(typing.get_type_hints(hint, include_extras=True)[inner.name])} "
                f"| {_default(inner)} | {field_docs(typing.cast(type, hint))[inner.name]} |"
                for inner in dataclasses.fields(hint)
            ]
            continue
        lines.append(f"| `{field.name}` | {_type(hint)} | {_default(field)} | {docs[field.name]} |")
    return "\n".join([*lines, ""])


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = next((str(extra) for extra in arguments[1:] if isinstance(extra, Range)), "")
        return f"{_type(arguments[0])} {bounds}".strip()
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if arguments == (int, float):
        return "int or float"
    if type(None) in arguments:
        (inner,) = (a for a in arguments if a is not type(None))
        return f"{_type(inner)} or null"
    if origin is dict:
        return "named group"
    if origin in (list, tuple):
        return "list of groups" if dataclasses.is_dataclass(arguments[0]) else f"list of {_type(arguments[0])}"
    return {int: "int", float: "float", str: "text", bool: "true/false"}[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is not dataclasses.MISSING else "*required*"
    value = field.default
    if value in (None, ""):
        return "null" if value is None else '`""`'
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    sys.exit(main())
