"""Turns Hydra's composed YAML into a typed Recipe. Every field must be known, of its type and in its range.

    composed DictConfig --> plain mapping --> recipes.schema.typed.build --> Recipe    (rules over fields: recipes.schema.rules)

Only this module and the entry points use Hydra's types.
"""

import json
import re
from dataclasses import asdict
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.schema.credentials import mapping_without_credentials
from recipes.schema.errors import RecipeError
from recipes.schema.foreign import literal
from recipes.schema.recipe import Recipe
from recipes.schema.typed import FieldError, build


class _RecipeDumper(yaml.SafeDumper):
    """Also quotes texts that OmegaConf, but not PyYAML, reads as numbers, such as `1e3`."""


_RecipeDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)?\.?[\d_]*([eE][-+]?\d+)?$"), list("-+0123456789.")
)
_TOOL_SECTIONS = ("hydra", "compress", "stages")
"""Sections of a composed recipe that other commands read."""


def read_recipe(composed: DictConfig) -> Recipe:
    """The typed recipe of a composed configuration. RecipeError has one line for each mistake."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise RecipeError(f"the recipe does not resolve: {error}") from error
    assert isinstance(plain, dict)
    return recipe_from_mapping({str(key): value for key, value in plain.items()})


def recipe_from_mapping(plain: dict[str, Any]) -> Recipe:
    """The typed recipe of a plain mapping, as in `recipe.yaml` of a run folder."""
    plain = {key: value for key, value in plain.items() if key not in _TOOL_SECTIONS}
    try:
        return build(Recipe, plain, "")
    except FieldError as error:
        raise RecipeError(str(error)) from error


def recipe_mapping(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, as in `recipe.yaml` and in checkpoints. URLs have no credentials."""
    return mapping_without_credentials(json.loads(json.dumps(asdict(recipe))))


def recipe_yaml(mapping: dict[str, Any]) -> str:
    """The content of a `recipe.yaml`. `${...}` in texts is escaped, so that it stays text when the file is composed again."""
    return yaml.dump(literal(mapping), Dumper=_RecipeDumper, sort_keys=False)
