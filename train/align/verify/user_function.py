"""A reward function of the user's: `module:function`, called with (prompt, answer, facts). It runs in the worker only."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from recipes.schema.errors import DataError
from train.align.verify.sample import Sample


def open_function(name: str) -> Callable[[Sample], Any]:
    """Import the function, also from the current folder. DataError if there is none."""
    module, colon, function = str(name).partition(":")
    if not (colon and module and function):
        raise DataError(f"name={name!r} is not module:function")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module may raise anything
        raise DataError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise DataError(f"{name} is not a function")
    return lambda sample: found(sample.prompt, sample.answer, dict(sample.facts))
