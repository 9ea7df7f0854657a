"""Errors a user can cause. Each message says the value, the place and the remedy; none needs a traceback to be understood."""

from data.errors import DataError


class StratumError(Exception):
    """Base of the errors below."""


class RecipeError(StratumError):
    """A recipe that cannot be run as written."""


class CheckpointError(StratumError):
    """A checkpoint that cannot be written, trusted or loaded."""


class NumericsError(StratumError):
    """Training went to NaN or infinity."""


class BackendError(StratumError):
    """The asked backend or device is not usable on this machine."""


USER_ERRORS: tuple[type[Exception], ...] = (StratumError, DataError)
