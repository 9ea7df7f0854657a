"""Hydra's command line for every program of this project, with errors that say what to do.

    words --text_words, whole_words--> Hydra: defaults of the dataclasses <- GROUP/*.yaml <- RECIPE.yaml <- words --> job

Hydra parses the words, composes the YAML and calls the job; nothing else of it is used: no working folders of its own,
no logging set-up, no `_target_`. Errors a user can cause end in one message on stderr and exit status 2.
"""

import dataclasses
import logging
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from recipes.schema.compress import CompressConfig
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError, StratumError
from recipes.schema.options import STRATUM, CommandParser, options_of
from recipes.schema.recipe import Recipe
from recipes.schema.suggestions import did_you_mean
from recipes.schema.typed import defaults_of, type_at

RECIPES = Path(__file__).resolve().parent.parent
"""Folder of the recipes shipped with this project: Hydra's search path starts here."""

_QUIET = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.sweep.dir": "runs",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
    # Hydra composes its own settings before the recipe; `hydra/env` is the group it leaves for programs. Defaults put there
    # come first for every recipe, also one of the user's that does not name them, and any field can then be overridden.
    "hydra/env": "recipe_defaults",
}
"""Hydra's own folders and logging, turned off: a run's files lie in its run folder. (A sweep leaves runs/multirun.yaml.)"""

_SECTIONS: dict[str, type] = {"compress": CompressConfig}
"""Sections of a composed recipe that tools read, and their fields."""


def run_command(
    job: Callable[[DictConfig], int],
    words: Sequence[str],
    *,
    program: str,
    keys: list[str],
    user_errors: tuple[type[Exception], ...],
) -> int:
    """Compose the recipe that `words` name and call `job` with it (once per job of a sweep). -> exit status.

    program: the command, as after `stratum`; keys: every dotted key a recipe can have and every option of the command, to
    name the nearest; user_errors: what ends in a message, not a traceback.
    """
    store_defaults()
    before = sys.argv
    sys.argv = with_overrides(whole_words(text_words([program, *words])), _QUIET)
    try:
        return _run(job, given=words, program=program, keys=keys, user_errors=user_errors)
    finally:
        sys.argv = before


def _run(
    job: Callable[[DictConfig], int],
    *,
    given: Sequence[str],
    program: str,
    keys: list[str],
    user_errors: tuple[type[Exception], ...],
) -> int:
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    head = f"%(asctime)s rank {rank} %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=head, stream=sys.stderr)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of Hydra's own report
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(RECIPES), config_name=None)
    def entry(composed: DictConfig) -> None:
        if HydraConfig.get().job.config_name is None:
            raise DataError(f"no recipe named. Start with `{STRATUM} {program} -cn NAME`; {_shipped()}")
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _name_sweep_job(composed)
        try:
            statuses.append(job(composed))
        except user_errors as error:
            _complain(str(error), rank=rank)
            statuses.append(error.status if isinstance(error, StratumError) else 2)

    try:
        entry()
    except user_errors as error:
        _complain(str(error), rank=rank)
        return error.status if isinstance(error, StratumError) else 2
    except OverrideParseException as error:
        words = {word.lstrip("+"): word for word in given}
        _complain(_unreadable(words.get(error.override.lstrip("+"), error.override)), rank=rank)
        return 2
    except HydraException as error:
        _complain(_explain(str(error), program=program, keys=keys), rank=rank)
        return 2
    except KeyboardInterrupt:
        _complain("interrupted. What was saved before is intact; the same command continues from there.", rank=rank)
        return 130
    return max(statuses, default=0)


def run_tool[T](
    parser: CommandParser,
    arguments: Sequence[str],
    options: type[T],
    job: Callable[[T, DictConfig], int],
    *,
    keys: list[str],
    user_errors: tuple[type[Exception], ...],
) -> int:
    """Parse a tool's own options (the fields of `options`), compose the recipe, call `job` with both. -> exit status."""
    parser.add_fields(options)
    parsed, words = parser.parse_recipe(arguments)
    config = parser.fields(options, parsed)
    return run_command(
        lambda composed: job(config, composed),
        words,
        program=parser.prog.removeprefix(STRATUM).strip(),
        keys=[*options_of(options), *keys],
        user_errors=user_errors,
    )


def store_defaults() -> None:
    """Give Hydra the dataclasses' defaults: those of a recipe as what everything else is merged into, and those of the
    `compress` section, which few recipes have, as the option `compress: standard`."""
    store = ConfigStore.instance()
    store.store("recipe_defaults", defaults_of(Recipe), group="hydra/env", package="_global_")
    store.store("standard", defaults_of(CompressConfig), group="compress")
    # Options that earlier recipes had to name and that said nothing but defaults.
    for group, name in (
        *((group, "standard") for group in ("run", "checkpoint", "evaluate", "telemetry")),
        ("data", "reading"),
    ):
        store.store(name, {}, group=group)


def text_words(words: list[str]) -> list[str]:
    """A command line whose values for text fields mean what is written, where Hydra's grammar would read something else.

    `run.name=123` is a number to it, `launch.container.mounts=/a:/a,/b:/b` a sweep, `registry#name:tag` an error.
    """
    parser = OverridesParser.create()
    is_sweep = bool({"-m", "--multirun"} & set(words))

    def readable(word: str) -> str:
        key, sign, value = word.partition("=")
        if not sign or key.startswith("-") or _type_of(key.lstrip("+")) is not str:
            return word
        try:
            override = parser.parse_override(word)
        except HydraException:
            if is_sweep and "," in value:
                return word
        else:
            if override.is_sweep_override():
                sweep = override.value()
                if is_sweep or not (isinstance(sweep, ChoiceSweep) and sweep.simple_form):
                    return word
            elif not isinstance(override.value(), bool | int | float | dict):
                return word
        return f"{key}={_quoted(value)}"

    return [words[0], *map(readable, words[1:])]


def whole_words(words: list[str]) -> list[str]:
    """A command line in which a named group given whole (`data.sources={...}`) replaces the recipe's, as a list does, and
    one field of an item (`data.sources.mine.weight=2`) needs no plus, whether or not the YAML names it."""
    found = []
    for word in words:
        key, sign, _ = word.partition("=")
        name = key.lstrip("+")
        if sign and not key.startswith(("-", "~")) and typing.get_origin(_type_of(name)) is dict:
            found += [f"~{name}", f"+{word.lstrip('+')}"]
        elif sign and _is_in_named_group(name):
            found.append(f"++{word.lstrip('+')}")
        else:
            found.append(word)
    return found


def section(composed: DictConfig, name: str) -> dict[str, Any]:
    """A section of the composed YAML as plain values; empty where there is none."""
    return cast(dict[str, Any], OmegaConf.to_container(composed.get(name) or OmegaConf.create({}), resolve=True))


def asked_for() -> tuple[str, list[str]]:
    """(recipe, overrides) of the command line that is running, for commands that write command lines."""
    config = HydraConfig.get()
    return str(config.job.config_name), [word for word in config.overrides.task if not word.startswith("hydra")]


def inherited_sources(composed: DictConfig) -> str:
    """What a recipe that names sources of its own also inherits, for people; empty where it inherits none. Inside a job."""
    config = HydraConfig.get()
    files = [Path(source.path) / f"{config.job.config_name}.yaml" for source in config.runtime.config_sources]
    file = next((path for path in files if path.is_file()), None)
    body = OmegaConf.select(OmegaConf.load(file), "data.sources") if file is not None else None
    names = [str(name) for name in composed.data.sources or () if body and name not in body]
    if not body or not names:
        return ""
    verb, own = "is" if len(names) == 1 else "are", ", ".join(map(str, body))
    return (
        f"data.sources: {', '.join(names)} {verb} inherited and mixed with {config.job.config_name}'s own, {own}. To train on "
        f"its own alone, put data/no_sources before _self_ in its defaults."
    )


def recipe_words(folder: str | None) -> list[str]:
    """The words that name the running command's recipe again, with `folder` as one more place of groups and recipes."""
    config = HydraConfig.get()
    own = [source.path for source in config.runtime.config_sources if source.provider == "command-line"]
    name = ["-cn", str(config.job.config_name)]
    if folder is None:
        return [*(f"--config-dir={path}" for path in own), *name]
    if not own:
        return [f"--config-dir={folder}", *name]
    # Hydra takes one such folder; further ones are given by its search path.
    return [f"--config-dir={own[0]}", *name, f"hydra.searchpath=[file://{folder}]"]


def with_overrides(words: list[str], overrides: dict[str, str]) -> list[str]:
    """A command line with overrides added, those aside that it has already.

    All stand where the user's last override is: Hydra's parser wants them side by side, whatever order they are written in.
    """
    given = {word.split("=", 1)[0].lstrip("+~") for word in words}
    added = [f"{key}={value}" for key, value in overrides.items() if key not in given]
    places = [i for i, word in enumerate(words) if i and not word.startswith("-") and ("=" in word or word[0] == "~")]
    if places:
        before = [word for i, word in enumerate(words[: places[-1]]) if i not in places]
        return [*before, *(words[i] for i in places), *added, *words[places[-1] + 1 :]]
    return [*words, *added]


def dotted_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass of fields and groups, groups included."""
    keys = []
    for field in dataclasses.fields(cls):
        keys.append(f"{prefix}{field.name}")
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            keys += dotted_keys(field.type, f"{prefix}{field.name}.")
    return keys


def _type_of(key: str) -> Any:
    """Type of the recipe field, or field of a tool's section, at a dotted key; None where there is none."""
    first, _, rest = key.partition(".")
    return type_at(_SECTIONS[first], rest) if rest and first in _SECTIONS else type_at(Recipe, key)


def _is_in_named_group(key: str) -> bool:
    """Whether a key names an item of a named group, or a field of one."""
    parts = key.split(".")
    groups = (".".join(parts[:count]) for count in range(1, len(parts)))
    return _type_of(key) is not None and any(typing.get_origin(_type_of(group)) is dict for group in groups)


def _quoted(value: str) -> str:
    """A value as one text to Hydra's grammar, in which a backslash counts only before the closing kind of quote."""
    quote = "'" if '"' in value else '"'
    escaped = re.sub(rf"(\\*)({quote}|$)", lambda found: found[1] * 2 + "\\" * bool(found[2]) + found[2], value)
    return f"{quote}{escaped}{quote}"


def _name_sweep_job(composed: DictConfig) -> None:
    """Give each job of a sweep a run folder of its own, named after what it overrides."""
    words = (word.lstrip("+") for word in HydraConfig.get().overrides.task if not word.startswith("~"))
    overrides = ",".join(sorted(word for word in words if not word.startswith("run.name=")))
    with open_dict(composed):
        composed.run.name = f"{composed.run.name}-{re.sub(r'[^A-Za-z0-9_.=,+-]', '_', overrides)}"
    OmegaConf.set_struct(composed, True)


def _explain(message: str, *, program: str, keys: list[str]) -> str:
    """Hydra's message with a remedy: the nearest key, option, group or recipe, or the plus that is missing."""
    message = message.strip()
    if unknown := re.search(r"Could not override '([^']+)'", message):
        return _unknown_key(unknown[1], program=program, keys=keys)
    if there := re.search(r"Could not append to config\. An item is already at '([^']+)'", message):
        return f"{there[1]} is in this recipe already. Override it without the plus: {there[1]}=..."
    if gone := re.search(r"Could not delete from config\. '([^']+)' does not exist", message):
        return f"~{gone[1]} removes nothing: this recipe has no {gone[1]}."
    if choice := re.search(
        r"Could not find '(\w+)/([^']+)'\s*\n+Available options in '[^']+':\n((?:\t[^\n]+\n?)+)", message
    ):
        group, wanted, names = choice[1], choice[2], [name.strip() for name in choice[3].strip().splitlines()]
        hint = did_you_mean(wanted, names, otherwise="").strip()
        return f"{group}={wanted}: there is no such {group}. {hint} There are: {', '.join(names)}.".replace("  ", " ")
    if recipe := re.search(r"Cannot find primary config '([^']+)'", message):
        return (
            f"there is no recipe {recipe[1]!r}. {did_you_mean(recipe[1], _names(), otherwise='')} {_shipped()}".replace(
                "  ", " "
            )
        )
    return message


def _unknown_key(key: str, *, program: str, keys: list[str]) -> str:
    of_source = re.fullmatch(r"data\.sources\.([^.]+)\.(\w+)", key)
    if of_source:
        fields = [field.name for field in dataclasses.fields(SourceConfig)]
        if of_source[2] in fields:
            return f"{key} is not in this recipe yet. Add it with a plus: +{key}=..."
        hint = did_you_mean(of_source[2], fields, otherwise=f"There are: {', '.join(fields)}.")
        return f"unknown field {of_source[2]!r} of a source on the command line. {hint}"
    if key in keys and key in _groups():  # a run's recipe.yaml, for one, is not composed of groups
        return (
            f"{key}=...: this recipe does not take its {key} from a group, so the group cannot be swapped. Override fields, "
            f"as in {key}.FIELD=..., or name the recipe the run was started with: -cn NAME {key}=..."
        )
    if key in keys or key in _groups():
        return f"{key} is not in this recipe yet. Add it with a plus: +{key}=..."
    hint = did_you_mean(
        key,
        [*keys, *([] if "." in key else _groups())],
        otherwise=f"`{STRATUM} {program} -cn NAME --cfg job` shows every key.",
    )
    return f"unknown recipe key {key!r} on the command line. {hint}"


def _names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _groups() -> list[str]:
    return sorted({*_SECTIONS, *(path.parent.name for path in RECIPES.glob("*/*.yaml"))})


def _unreadable(word: str) -> str:
    """What Hydra's grammar cannot read, and the same word with its value quoted, once for Hydra and once for the shell."""
    key, _, value = word.partition("=")
    if value[:1] in ("{", "["):
        example = shlex.quote(key + '={name: {path: "s3://bucket/day=1/*.parquet"}}')
        return f"{word} cannot be read. Inside braces and brackets, quote each text that has = : # ( ) or a comma: {example}"
    return f"{word} cannot be read. Quote the value, and the whole word for the shell: {shlex.quote(f'{key}={_quoted(value)}')}"


def _shipped() -> str:
    return f"The recipes are: {', '.join(_names())} (your own: --config-dir FOLDER)."


def _complain(message: str, *, rank: int) -> None:
    """One message; with several processes the others' are marked with their rank, as theirs may differ."""
    head = "error" if rank == 0 else f"error on rank {rank}"
    sys.stderr.write(f"{head}: {message}\n")
    sys.stderr.flush()
