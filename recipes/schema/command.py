"""Hydra's command line for every command of this project, with errors that say what to do.

    words --quote_texts, replace_groups--> Hydra: dataclass defaults <- GROUP/*.yaml <- RECIPE.yaml <- words --> job

The words are the arguments of the command line. Hydra parses them and composes the YAML. Nothing else of Hydra is used: not its
entry point, plugins, callbacks, working folders, logging or `_target_`. A recipe may come from someone else, so
`recipes.schema.recipe_source` refuses whatever would run code or read files. An error that a user can cause ends in one message
on stderr and exit status 2.
"""

import argparse
import dataclasses
import hashlib
import itertools
import logging
import os
import re
import shlex
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from hydra import compose as hydra_compose

# Hydra's public `initialize` reads recipe files unchecked and imports every installed plugin. These four do the same with our
# reader of recipe files and without plugins. Another version of Hydra may move them, so pyproject.toml requires one below 1.4,
# and tests/rules/test_dependencies.py reports what is missing.
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from recipes.schema.compress import CompressConfig
from recipes.schema.data import SourceConfig
from recipes.schema.engine_switches import about_switch
from recipes.schema.errors import RecipeError, StratumError
from recipes.schema.foreign import printable
from recipes.schema.messages import SYSTEM_REMEDIES, complain, describe_system_error
from recipes.schema.options import STRATUM, CommandParser, options_of
from recipes.schema.recipe import Recipe
from recipes.schema.recipe_source import RecipeSource, refuse_code_in_word
from recipes.schema.suggestions import did_you_mean
from recipes.schema.typed import defaults_of, type_at

RECIPES = Path(__file__).resolve().parent.parent
"""Folder of the recipes shipped with this project, first in Hydra's search path."""

_SEARCH = "hydra.searchpath="
"""The only setting of Hydra that the command line may contain: more folders of recipes."""
_MOST_JOBS = 1000
"""Most runs of one sweep."""
_LONGEST_NAME = 150
"""Most characters that a sweep adds to the name of a run."""

_SECTIONS: dict[str, type] = {"compress": CompressConfig}
"""Sections of a composed recipe that tools read, and their fields."""

_RANK_0_S = 10.0
"""Seconds that rank 0 has under torchrun to print an error of the recipe before other ranks print it too."""


def run_command(
    job: Callable[[DictConfig], int],
    arguments: Sequence[str],
    *,
    program: str,
    keys: list[str],
    user_errors: tuple[type[Exception], ...],
) -> int:
    """Compose the recipe that the arguments name and call `job` with it (once per job of a sweep). -> exit status.

    program: the command, as after `stratum`. keys: every dotted key of a recipe and every option of the command, for
    suggestions. user_errors: errors that end in a message, not a traceback, in addition to StratumError.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s rank {rank} %(name)s: %(message)s", stream=sys.stderr
    )
    head = "error" if rank == 0 else f"error on rank {rank}"
    statuses: list[int] = []
    user_errors = (StratumError, *user_errors)
    try:
        parsed = _parsed(arguments, program=program)
        for composed in _composed(parsed, given=arguments, program=program, keys=keys):
            if parsed.cfg:
                _show(composed, parsed)
                return 0
            try:
                statuses.append(job(_without_hydra(composed)))
            except user_errors as error:
                if not parsed.multirun:
                    raise
                statuses.append(complain(error, head=head))
    except user_errors as error:
        if rank and isinstance(error, RecipeError) and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(_RANK_0_S)  # all ranks find it, and torchrun ends this one when rank 0 has printed it
        return complain(error, head=head)
    except OSError as error:
        if error.errno not in SYSTEM_REMEDIES:
            raise
        return complain(describe_system_error(error), head=head)
    except KeyboardInterrupt:
        complain("interrupted before a step was finished. Nothing was written.", head=head)
        return 130
    finally:
        GlobalHydra.instance().clear()
    return max(statuses, default=0)


def _parsed(words: Sequence[str], *, program: str) -> argparse.Namespace:
    """Parse Hydra's options. Hydra's own entry point would act on a recipe before it is checked."""
    parser = _Words(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-cn", "--config-name")
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parsed = parser.parse_intermixed_args(list(words))
    if not parsed.config_name:
        raise RecipeError(f"no recipe was named. Use `{STRATUM} {program} -cn NAME`; {_shipped()}")
    return parsed


def _composed(
    parsed: argparse.Namespace, *, given: Sequence[str], program: str, keys: list[str]
) -> Iterator[DictConfig]:
    """Compose the recipe, with Hydra's own section: one, or one for each job of a sweep.

    Hydra's section has no effect: its callbacks, plugins and logging are never created. RecipeError names the problem.
    """
    store_defaults()
    by_word = {word.lstrip("+"): word for word in given}
    try:
        for word in parsed.overrides:
            refuse_code_in_word(word)
        overrides = replace_groups(quote_texts(parsed.overrides, is_sweep=parsed.multirun))
        for jobs, is_job in _jobs(overrides, parsed):
            _initialize(parsed)
            # The group of defaults comes first for every recipe, also for a user's that does not name it, so that any field can
            # be overridden. `hydra/env` is the group that Hydra composes before the recipe and reserves for programs.
            composed = hydra_compose(parsed.config_name, ["hydra/env=recipe_defaults", *jobs], return_hydra_config=True)
            HydraConfig.instance().set_config(composed)
            if is_job:
                _name_sweep_job(composed, jobs)
            yield composed
    except OverrideParseException as error:
        raise RecipeError(_unreadable(by_word.get(error.override.lstrip("+"), error.override))) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(_explain(str(error), program=program, keys=keys)) from error
    except RecursionError as error:
        raise RecipeError("the recipe or an argument is nested too deeply. Use fewer braces and brackets.") from error
    except (ValueError, TypeError) as error:  # Hydra raises these, e.g. for ~model=1e400 or data=[[]]
        raise RecipeError(f"the recipe cannot be composed: {printable(str(error), most=200)}") from error


def _initialize(parsed: argparse.Namespace) -> None:
    """Set Hydra's search path: shipped recipes, --config-dir, folders of hydra.searchpath. RecipeSource reads all of them."""
    for source in (RecipeSource, StructuredConfigSource):
        SourcesRegistry.instance().register(source)
    search = ConfigSearchPathImpl()
    search.append("main", f"{RecipeSource.scheme()}://{RECIPES}")
    if parsed.config_dir is not None:
        own = Path(parsed.config_dir).resolve()
        if not own.is_dir():
            raise RecipeError(
                f"--config-dir {printable(parsed.config_dir)} is not a folder. Give the folder of your recipes."
            )
        search.append("command-line", f"{RecipeSource.scheme()}://{own}")
    for folder in parsed.more_folders:
        search.append("command-line, more", f"{RecipeSource.scheme()}://{folder}")
    search.append("schema", "structured://")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name=STRATUM, config_search_path=search)


def _jobs(words: list[str], parsed: argparse.Namespace) -> Iterator[tuple[list[str], bool]]:
    """(overrides, True) for each job of a sweep; without -m, (overrides, False) for the one recipe."""
    parsed.more_folders = [folder for word in words if word.startswith(_SEARCH) for folder in _search_folders(word)]
    words = [word for word in words if not word.startswith(_SEARCH)]
    if not parsed.multirun:
        yield words, False
        return
    _initialize(parsed)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    choices: list[list[str]] = []
    count = 1
    for word, override in zip(words, parser.parse_overrides(words), strict=True):
        if not override.is_sweep_override():
            choices.append([word])
            continue
        if not override.is_discrete_sweep():
            raise RecipeError(f"{printable(word)}: a sweep needs a list of values, as in 1e-3,3e-4.")
        key = override.get_key_element()
        values = list(itertools.islice(override.sweep_string_iterator(), _MOST_JOBS + 1))
        choices.append([f"{key}={value}" for value in values])
        count *= len(values)
        if count > _MOST_JOBS:
            raise RecipeError(f"-m: this sweep has more than {_MOST_JOBS:,} runs. Use fewer values.")
    for one in itertools.product(*choices):
        yield list(one), True


def _search_folders(word: str) -> list[str]:
    """Folders of `hydra.searchpath=[file://FOLDER, ...]`, which contain more groups and recipes."""
    value = OverridesParser.create().parse_override(word).value()
    if not isinstance(value, list) or not all(isinstance(one, str) and one.startswith("file://") for one in value):
        raise RecipeError(f"{printable(word)}: use {_SEARCH}[file://FOLDER].")
    return [str(Path(one.removeprefix("file://")).resolve()) for one in value]


def _without_hydra(composed: DictConfig) -> DictConfig:
    with open_dict(composed):
        own: DictConfig = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    OmegaConf.set_struct(own, True)
    return own


def _show(composed: DictConfig, parsed: argparse.Namespace) -> None:
    """Print the composed recipe in the form that --cfg, --package and --resolve give."""
    shown: Any = composed if parsed.cfg == "all" else _without_hydra(composed)
    if parsed.cfg == "hydra":
        shown = OmegaConf.masked_copy(composed, ["hydra"])
    if parsed.package not in (None, "_global_"):
        shown = OmegaConf.select(shown, parsed.package)
        if shown is None:
            raise RecipeError(
                f"--package {printable(parsed.package)}: the recipe has no such part. Use a group, such as model."
            )
        sys.stdout.write(f"# @package {printable(parsed.package)}\n")
    try:
        text = OmegaConf.to_yaml(shown, resolve=parsed.resolve) if OmegaConf.is_config(shown) else f"{shown}\n"
    except OmegaConfBaseException as error:
        raise RecipeError(f"the recipe does not resolve: {printable(str(error))}") from error
    sys.stdout.write(text)


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
    """Give Hydra the dataclasses' defaults.

    Those of a recipe are the base into which everything else is merged. Those of the `compress` section, which few recipes
    have, are the option `compress: standard`.
    """
    store = ConfigStore.instance()
    store.store("recipe_defaults", defaults_of(Recipe), group="hydra/env", package="_global_")
    store.store("standard", defaults_of(CompressConfig), group="compress")
    for name, groups in {
        "default": ("output", "help", "hydra_help", "job_logging", "hydra_logging"),
        "basic": ("launcher", "sweeper"),
    }.items():  # Hydra's own defaults list names them; they are never used
        for group in groups:
            store.store(name, {}, group=f"hydra/{group}")
    # Earlier recipes had to name these options, which contained only defaults.
    for group, name in (
        *((group, "standard") for group in ("run", "checkpoint", "evaluate", "telemetry")),
        ("data", "reading"),
    ):
        store.store(name, {}, group=group)


def quote_texts(words: list[str], *, is_sweep: bool = False) -> list[str]:
    """Quote values of text fields that Hydra's grammar would read as something else.

    For Hydra `run.name=123` is a number, `launch.container.mounts=/a:/a,/b:/b` a sweep, `registry#name:tag` an error.
    """
    parser = OverridesParser.create()

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

    return list(map(readable, words))


def replace_groups(words: list[str]) -> list[str]:
    """Change overrides of named groups so that Hydra treats them like other fields.

    A whole named group (`data.sources={...}`) then replaces the recipe's, as a list does. One field of an item
    (`data.sources.mine.weight=2`) needs no plus, whether or not the YAML names it.
    """
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
    """A section of the composed YAML as plain values; empty without one."""
    found = composed.get(name)
    if found is None:
        return {}
    if not isinstance(found, DictConfig):
        raise RecipeError(f"{name}={printable(str(found), most=80)} is not a group of fields.")
    try:
        return cast(dict[str, Any], OmegaConf.to_container(found, resolve=True))
    except OmegaConfBaseException as error:
        raise RecipeError(f"{name}: the recipe does not resolve: {printable(str(error))}") from error


def recipe_and_overrides() -> tuple[str, list[str]]:
    """(recipe, overrides) of the running command, for commands that print or store command lines."""
    config = HydraConfig.get()
    return str(config.job.config_name), [word for word in config.overrides.task if not word.startswith("hydra")]


def inherited_sources(composed: DictConfig) -> str:
    """A note for the plan if a recipe that names sources also inherits others; otherwise empty. Call it inside a job."""
    config = HydraConfig.get()
    files = [Path(source.path) / f"{config.job.config_name}.yaml" for source in config.runtime.config_sources]
    file = next((path for path in files if path.is_file()), None)
    body = OmegaConf.select(OmegaConf.load(file), "data.sources") if file is not None else None
    names = [str(name) for name in composed.data.sources or () if body and name not in body]
    if not body or not names:
        return ""
    verb, named = "is" if len(names) == 1 else "are", ", ".join(map(str, body))
    return (
        f"data.sources: {', '.join(names)} {verb} inherited, and mixed with those that {config.job.config_name} names, "
        f"{named}. To train on these alone, put data/no_sources before _self_ in its defaults."
    )


def recipe_words(folder: str | None) -> list[str]:
    """Arguments that name the running command's recipe, with `folder` as one more folder of groups and recipes."""
    config = HydraConfig.get()
    own = [source.path for source in config.runtime.config_sources if source.provider == "command-line"]
    name = ["-cn", str(config.job.config_name)]
    if folder is None:
        return [*(f"--config-dir={path}" for path in own), *name]
    if not own:
        return [f"--config-dir={folder}", *name]
    # Hydra accepts one --config-dir. Further folders go into its search path.
    return [f"--config-dir={own[0]}", *name, f"hydra.searchpath=[file://{folder}]"]


def dotted_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass, groups included."""
    keys = []
    for field in dataclasses.fields(cls):
        keys.append(f"{prefix}{field.name}")
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            keys += dotted_keys(field.type, f"{prefix}{field.name}.")
    return keys


def _type_of(key: str) -> Any:
    """Type of the field at a dotted key, of the recipe or of a tool's section; None without one."""
    first, _, rest = key.partition(".")
    return type_at(_SECTIONS[first], rest) if rest and first in _SECTIONS else type_at(Recipe, key)


def _is_in_named_group(key: str) -> bool:
    """Whether a key names an item of a named group, or a field of one."""
    parts = key.split(".")
    groups = (".".join(parts[:count]) for count in range(1, len(parts)))
    return _type_of(key) is not None and any(typing.get_origin(_type_of(group)) is dict for group in groups)


def _quoted(value: str) -> str:
    """A value quoted for Hydra's grammar, in which a backslash has a meaning only before the closing kind of quote."""
    quote = "'" if '"' in value else '"'
    escaped = re.sub(rf"(\\*)({quote}|$)", lambda found: found[1] * 2 + "\\" * bool(found[2]) + found[2], value)
    return f"{quote}{escaped}{quote}"


def _name_sweep_job(composed: DictConfig, words: Sequence[str]) -> None:
    """Give each job of a sweep its own run.name, made of its overrides."""
    stripped = (word.lstrip("+") for word in words if not word.startswith(("~", "hydra")))
    overrides = ",".join(sorted(word for word in stripped if not word.startswith("run.name=")))
    ending = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", overrides)
    if len(ending) > _LONGEST_NAME:
        ending = f"{ending[:_LONGEST_NAME]}-{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"
    with open_dict(composed):
        composed.run.name = f"{composed.run.name}-{ending}"


def _explain(message: str, *, program: str, keys: list[str]) -> str:
    """Hydra's message with a remedy: the nearest key, option, group or recipe, or a missing plus."""
    message = message.strip()
    if unknown := re.search(r"Could not override '([^']+)'", message):
        return _unknown_key(unknown[1], program=program, keys=keys)
    if there := re.search(r"Could not append to config\. An item is already at '([^']+)'", message):
        return f"{there[1]} is already in this recipe. Override it without the plus: {there[1]}=..."
    if gone := re.search(r"Could not delete from config\. '([^']+)' does not exist", message):
        return f"~{gone[1]} removes nothing, because this recipe has no {gone[1]}. Leave it out."
    if choice := re.search(
        r"Could not find '(\w+)/([^']+)'\s*\n+Available options in '[^']+':\n((?:\t[^\n]+\n?)+)", message
    ):
        group, wanted, names = choice[1], choice[2], [name.strip() for name in choice[3].strip().splitlines()]
        hint = did_you_mean(wanted, names, otherwise="").strip()
        return f"{group}={wanted}: there is no such {group}. {hint} Use one of {', '.join(names)}.".replace("  ", " ")
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
        hint = did_you_mean(of_source[2], fields, otherwise=f"Use one of {', '.join(fields)}.")
        return f"unknown field {of_source[2]!r} of a source on the command line. {hint}"
    if key in keys and key in _groups():  # e.g. a run's recipe.yaml, which is not composed of groups
        return (
            f"{key}=...: this recipe does not take its {key} from a group, so the group cannot be swapped. Override fields, "
            f"as in {key}.FIELD=..., or name the recipe with which the run was started: -cn NAME {key}=..."
        )
    if key in keys or key in _groups():
        return f"{key} is not in this recipe yet. Add it with a plus: +{key}=..."
    hint = about_switch(key) or did_you_mean(
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
    """A message about an argument that Hydra cannot parse, with the same argument quoted for Hydra and for the shell."""
    key, _, value = word.partition("=")
    in_file = (
        "write a name with other characters than letters, digits, _ - and . in a recipe file (--config-dir FOLDER)"
    )
    if re.search(r"""[{,]\s*(["'])(?:(?!\1).)*\1\s*:""", value):
        return f"{word} cannot be read. A key in braces cannot be quoted on a command line: {in_file}."
    if value[:1] in ("{", "["):
        example = shlex.quote(key + '={name: {path: "s3://bucket/day=1/*.parquet"}}')
        return (
            f"{word} cannot be read. Inside braces and brackets, quote each text that contains = : # ( ) or a comma: {example}. "
            f"Keys cannot be quoted: {in_file}."
        )
    return f"{word} cannot be read. Quote the value, and the whole word for the shell: {shlex.quote(f'{key}={_quoted(value)}')}"


def _shipped() -> str:
    return f"The recipes are: {', '.join(_names())} (your own: --config-dir FOLDER)."


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)
