"""Recipes composed by the door every command uses."""

import copy
import functools
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.schema.command import dotted_keys, run_command
from recipes.schema.recipe import Recipe


def composed(*words: str) -> dict[str, Any]:
    """What the words of a command line, `-cn NAME` first, compose to, as plain values."""
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
