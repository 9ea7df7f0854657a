"""Packages of an extra that may not be installed: the error says what to install."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from recipes.schema.errors import BackendError


@contextmanager
def optional_package(name: str, *, extra: str) -> Iterator[None]:
    """Turn the lack of an optional package into a BackendError that says what to do. name: as it is imported."""
    try:
        importlib.import_module(name)
        yield
    except ImportError as error:
        raise BackendError(
            f"this needs the package {name.replace('_', '-')}, which cannot be imported ({error}). Install the extra: pip "
            f"install 'stratum-pretrain[{extra}]'."
        ) from error
