"""Errors a user can cause. Each message gives the value, the place and the remedy; none needs a traceback to be understood."""


class StratumError(Exception):
    """Base of the errors below: what ends a command with one message and exit status 2."""


class DataError(StratumError):
    """Data that cannot be used as configured: missing, unreadable, empty, damaged or not matching the model."""


class RecipeError(StratumError):
    """A recipe that cannot be run as written."""


class CheckpointError(StratumError):
    """A checkpoint that cannot be written, trusted or loaded."""


class NumericsError(StratumError):
    """Training produced NaN or infinity."""


class BackendError(StratumError):
    """The configured backend or device is not usable on this machine."""


USER_ERRORS: tuple[type[Exception], ...] = (StratumError,)
