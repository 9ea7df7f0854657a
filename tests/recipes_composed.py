"""Recipes composed as by every command."""

import copy
import functools
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.schema.command import dotted_keys, run_command
from recipes.schema.recipe import Recipe


def composed(*words: str) -> dict[str, Any]:
    """The recipe that the words of a command line compose to (`-cn NAME` first), as plain values."""
    return copy.deepcopy(_composed(*words))


@functools.cache  # a third of a second each
def _composed(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def keep(config: DictConfig) -> int:
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        found.update({str(key): value for key, value in plain.items()})
        return 0

    status = run_command(keep, words, program="test", keys=dotted_keys(Recipe), user_errors=())
    assert status == 0, words
    return found
