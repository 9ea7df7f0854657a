"""Errors a user can cause. Each message gives the value, the place and the remedy; none needs a traceback to be understood."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that keeps a recipe from running, as a rule found it (`recipes.schema.rules`)."""

    key: str
    """The recipe field it is about, e.g. `parallel.tensor`."""
    text: str
    """Value and place, as whole sentences."""
    remedy: str = ""
    """What to do, as whole sentences."""

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}".rstrip()


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


def refuse(problems: Iterable[Problem], error: type[StratumError] = RecipeError) -> None:
    """Raise `error` with every problem, a line or more each; nothing where there are none."""
    lines = [str(problem) for problem in problems]
    if lines:
        raise error("\n".join(dict.fromkeys(lines)))
