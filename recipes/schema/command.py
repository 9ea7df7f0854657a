"""Hydra's command line for every program of this project, with errors that say what to do.

Hydra parses the words, composes the YAML and calls the job; nothing else of it is used: no working folders of its own,
no logging set-up, no `_target_`. Errors a user can cause end in one message on stderr and exit status 2.
"""

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.options import STRATUM, CommandParser, options_of
from recipes.schema.suggestions import did_you_mean

RECIPES = Path(__file__).resolve().parent.parent
"""Folder of the recipes shipped with this project: Hydra's search path starts here."""

_QUIET = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.sweep.dir": "runs",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
}
"""Hydra's own folders and logging, turned off: a run's files lie in its run folder. (A sweep leaves runs/multirun.yaml.)"""


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
    before = sys.argv
    sys.argv = with_overrides([program, *words], _QUIET)
    try:
        return _run(job, program=program, keys=keys, user_errors=user_errors)
    finally:
        sys.argv = before


def _run(
    job: Callable[[DictConfig], int], *, program: str, keys: list[str], user_errors: tuple[type[Exception], ...]
) -> int:
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    head = f"%(asctime)s rank {rank} %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=head, stream=sys.stderr)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of Hydra's own report
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(RECIPES), config_name=None)
    def entry(composed: DictConfig) -> None:
        if "run" not in composed:
            raise DataError(f"no recipe named. Start with `{STRATUM} {program} -cn NAME`; {_shipped()}")
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _name_sweep_job(composed)
        try:
            statuses.append(job(composed))
        except user_errors as error:
            _complain(str(error), rank=rank)
            statuses.append(2)

    try:
        entry()
    except user_errors as error:
        _complain(str(error), rank=rank)
        return 2
    except HydraException as error:
        _complain(_explain(str(error), program=program, keys=keys), rank=rank)
        return 2
    except KeyboardInterrupt:
        _complain("interrupted before a step was finished; nothing was written.", rank=rank)
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


def section(composed: DictConfig, name: str) -> dict[str, Any]:
    """A section of the composed YAML as plain values; empty where there is none."""
    return cast(dict[str, Any], OmegaConf.to_container(composed.get(name) or OmegaConf.create({}), resolve=True))


def asked_for() -> tuple[str, list[str]]:
    """(recipe, overrides) of the command line that is running, for commands that write command lines."""
    config = HydraConfig.get()
    return str(config.job.config_name), [word for word in config.overrides.task if not word.startswith("hydra")]


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


def _name_sweep_job(composed: DictConfig) -> None:
    """Give each job of a sweep a run folder of its own, named after what it overrides."""
    overrides = re.sub(r"(^|,)run\.name=[^,]*", "", HydraConfig.get().job.override_dirname).lstrip(",")
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
    return sorted({path.parent.name for path in RECIPES.glob("*/*.yaml")})


def _shipped() -> str:
    return f"The recipes are: {', '.join(_names())} (your own: --config-dir FOLDER)."


def _complain(message: str, *, rank: int) -> None:
    """One message; with several processes the others' are marked with their rank, as theirs may differ."""
    head = "error" if rank == 0 else f"error on rank {rank}"
    sys.stderr.write(f"{head}: {message}\n")
    sys.stderr.flush()
