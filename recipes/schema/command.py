"""Hydra's command line for every program of this project, with errors that say what to do.

Hydra parses the words, composes the YAML and calls the job; nothing else of it is used: no working folders of its own,
no logging set-up, no `_target_`. Errors a user can cause end in one message on stderr and exit status 2.
"""

import dataclasses
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError

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
    job: Callable[[DictConfig], int], *, program: str, keys: list[str], user_errors: tuple[type[Exception], ...]
) -> int:
    """Parse sys.argv, compose the recipe and call `job` with it (once per job of a sweep). -> exit status.

    keys: every dotted key a recipe can have, to name the nearest; user_errors: what ends in a message, not a traceback.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if "--info" not in sys.argv:  # which prints through Hydra's own logging
        head = f"%(asctime)s rank {rank} %(name)s: %(message)s"
        logging.basicConfig(level=logging.WARNING, format=head, stream=sys.stderr)
    if {"-h", "--help"} & set(sys.argv) and not rank:  # what it is for comes before what Hydra says of every program
        about = sys.modules[job.__module__].__doc__ or ""
        sys.stdout.write(
            f"{about.strip()}\n\nWhat the fields mean: python -m recipes.schema.reference [SECTION ...]\n\n"
        )
        sys.stdout.flush()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of Hydra's own report
    sys.argv[:] = with_overrides(sys.argv, _QUIET)
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(RECIPES), config_name=None)
    def entry(composed: DictConfig) -> None:
        if "run" not in composed:
            raise DataError(f"no recipe named. Start with `python -m {program} -cn NAME`; {_shipped()}")
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


def with_short_words(words: list[str], *, group: str, fields: list[str]) -> list[str]:
    """A command line whose own fields may be written short: `smoke step=12` for `-cn smoke +trace.step=12`."""
    named = any(word.startswith(("-cn", "--config-name")) for word in words)
    spelled = []
    for place, word in enumerate(words):
        if word.split("=", 1)[0] in fields and "=" in word:
            word = f"+{group}.{word}"
        elif place == 1 and not named and "=" not in word and not word.startswith("-"):
            spelled.append("-cn")
        spelled.append(word)
    return spelled


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
    if words[-1] == "--info":
        words = [*words, "all"]  # or the first word added would be taken for what --info is about
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
    """Hydra's message with a remedy: the nearest key, or the recipes there are."""
    unknown = re.search(r"Could not override '([^']+)'", message)
    if unknown:
        key = unknown.group(1)
        of_source = re.fullmatch(r"data\.sources\.([^.]+)\.(\w+)", key)
        if of_source:
            fields = [field.name for field in dataclasses.fields(SourceConfig)]
            if of_source[2] in fields:
                return f"{key} is not in this recipe yet. Add it with a plus: +{key}=..."
            near = difflib.get_close_matches(of_source[2], fields, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(fields)}."
            return f"unknown field {of_source[2]!r} of a source on the command line. {hint}"
        if key in keys:
            return f"{key} is a field, but this recipe does not list it, so Hydra wants a plus: +{key}=..."
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else f" `python -m {program} -cn NAME --cfg job` shows every key."
        return f"unknown recipe key {key!r} on the command line.{hint}"
    if "primary config" in message:
        return f"{message.strip().splitlines()[0]} {_shipped()}"
    return message.strip()


def _shipped() -> str:
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return f"the recipes are: {', '.join(names)} (your own: --config-dir FOLDER)."


def _complain(message: str, *, rank: int) -> None:
    """One message; with several processes the others' are marked with their rank, as theirs may differ."""
    head = "error" if rank == 0 else f"error on rank {rank}"
    sys.stderr.write(f"{head}: {message}\n")
    sys.stderr.flush()
