"""Checks recipe files before Hydra reads them, because a recipe may come from someone else.

    FOLDER/GROUP/NAME.yaml --RecipeSource--> plain YAML of limited size, without code --> Hydra composes it

These are refused, with file and key: Hydra's own section (its callbacks, logging, launchers and sweepers name callables and
files); `_target_`; interpolations that are not references to fields of the recipe (`${run.folder}`), because they read the
environment or files; and paths that leave the recipe's folder. Arguments of the command line follow the same rules.
"""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from recipes.schema.errors import RecipeError
from recipes.schema.foreign import parse_yaml, printable, read_bounded_text

SEARCH = "hydra.searchpath"
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_REFERENCE = re.compile(r"\$\{ *\.*(?!hydra\b)[\w-]+(?:[.\[][\w\-\]]+)* *\}")
"""A reference to a field of the recipe: names and dots, without a resolver (`name:`) and without nesting."""
_REMEDY = "Write the value itself, or a reference to a field of the recipe such as ${run.folder}."


class RecipeSource(ConfigSource):
    """A folder of recipes and groups."""

    @staticmethod
    def scheme() -> str:
        """The scheme of `recipe://FOLDER` in Hydra's search path."""
        return "recipe"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one file. RecipeError names file and key if it is not a valid recipe."""
        path = self._file(config_path)
        if not path.is_file():
            raise ConfigLoadError(f"Config not found : {path}")
        try:
            text = read_bounded_text(path)
            plain = parse_yaml(text)
            header = ConfigSource._get_header_dict(text[:512])
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        if plain is not None and not isinstance(plain, dict):
            raise RecipeError(f"{path} is not a recipe, because it is not a group of fields. Write it as KEY: VALUE.")
        if plain is not None and not isinstance(plain.get("defaults", []), list):
            raise RecipeError(f"{path}: defaults is not a list. Write it as in `defaults: [smoke, _self_]`.")
        for key, why in code_in(plain, package=header["package"] or ""):
            raise RecipeError(f"{path}: {printable(key)} {why}")
        config = OmegaConf.load(io.StringIO(text))
        return ConfigResult(config=config, path=self.full_path(), provider=self.provider, header=header)

    def available(self) -> bool:
        """Whether the folder exists."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Whether a path in the folder is a folder."""
        return self._is_inside(config_path) and os.path.isdir(os.path.join(self.path, config_path))

    def is_config(self, config_path: str) -> bool:
        """Whether a path in the folder is a recipe or an option of a group."""
        return self._is_inside(config_path) and "\0" not in config_path and os.path.lexists(self._file(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names in a folder, in the form that Hydra expects."""
        files: list[str] = []
        for name in os.listdir(os.path.join(self.path, config_path)):
            if not name.startswith("."):
                self._list_add_result(files, os.path.join(config_path, name), name, results_filter)
        return sorted(set(files))

    def _file(self, config_path: str) -> Path:
        if not self._is_inside(config_path):
            raise RecipeError(
                f"{printable(config_path)} leaves the folder of recipes {self.path}. Use --config-dir FOLDER."
            )
        return Path(self.path) / self._normalize_file_name(config_path)

    def _is_inside(self, config_path: str) -> bool:
        parts = config_path.split("/")
        return not config_path.startswith("/") and ".." not in parts


def code_in(plain: Any, *, package: str = "") -> Iterator[tuple[str, str]]:
    """(key, problem) for each key of a recipe file that does more than give a field a value. package: from the file's header."""
    if _is_hydra_section(package):
        yield "@package", f"{printable(package)} is Hydra's own section, which recipes must not set. Remove it."
    for entry in _defaults(plain):
        if _is_hydra_section(entry):
            yield "defaults", f"names {printable(entry)!r}, a part of Hydra's own section. Remove it."
    yield from _code(plain, "")


def refuse_code_in_word(word: str) -> None:
    """RecipeError for an argument that does more than give a field of the recipe a value."""
    key = word.partition("=")[0].lstrip("+~")
    is_search = word.startswith(f"{SEARCH}=")  # command.py reads it and accepts folders only
    if _is_hydra_section(key) and not is_search:
        raise RecipeError(f"{printable(word)}: Hydra's own settings are not used here. Remove this argument.")
    if word.count("{") + word.count("[") > 1000:
        raise RecipeError(f"{printable(word, most=80)}: too many brackets. Put the value into a recipe file.")
    try:
        override = OverridesParser.create().parse_override(word)
        value = override.value()
    except (HydraException, RecursionError):
        value = word.partition("=")[2]  # later it is reported as unreadable, or read as one text
    name = "_target_" if "_target_" in re.split(r"[.@/\[\]]", key) else key
    for where, why in _code({} if is_search else {name: value}, ""):
        raise RecipeError(f"{printable(word)}: {printable(where)} {why}")
    for why in _bad_interpolations(word.partition("=")[2]):
        raise RecipeError(f"{printable(word)}: {why}")


def _code(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            name = f"{where}.{key}" if where else str(key)
            parts = str(key).split(".")
            if "_target_" in parts:
                yield name, "names code to run, but recipes contain only values. Remove it."
            elif not where and _is_hydra_section(str(key)):
                yield name, "is Hydra's own section, which recipes must not set. Remove it."
            elif any(True for _ in _bad_interpolations(str(key))):
                yield name, "is computed, but the name of a field must be written out."
            yield from _code(inner, name)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _code(inner, f"{where}[{index}]")
    elif isinstance(value, str):
        for why in _bad_interpolations(value):
            yield where, why
    elif hasattr(value, "text"):  # a quoted text of Hydra's grammar
        yield from _code(str(value.text), where)


def _bad_interpolations(text: str) -> Iterator[str]:
    for found in _INTERPOLATION.finditer(text):
        start = found.end() - 2
        if not _REFERENCE.match(text, start):
            yield f"has {printable(text[start : start + 40])!r}, which reads something outside the recipe. {_REMEDY}"


def _defaults(plain: Any) -> Iterator[str]:
    """Every text of a file's defaults list."""
    entries = plain.get("defaults") if isinstance(plain, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            yield from (str(key) for key in entry)
        else:
            yield str(entry)


def _is_hydra_section(name: str) -> bool:
    """Whether a key, a group or a package is in Hydra's section: `hydra/launcher`, `override hydra/env`, `model@hydra.x`."""
    parts = (part.strip() for part in re.split(r"[\s@:]", name))
    return any(re.match(r"(_global_\.)?/?hydra(?![\w-])", part) for part in parts)
