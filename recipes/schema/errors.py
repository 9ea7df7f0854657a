"""Errors a user can cause. Each message gives the value, the place and the remedy; none needs a traceback to be understood."""

from collections.abc import Iterable
from dataclasses import dataclass

from recipes.schema.credentials import without_credentials


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
        """The sentences, without the passwords and tokens of URLs in them."""
        return without_credentials(f"{self.text} {self.remedy}".rstrip())


class StratumError(Exception):
    """Base of the errors below: what ends a command with one message and an exit status."""

    status = 2
    """Something has to be changed before the same command can work: never tried again by itself."""


class DataError(StratumError):
    """Data that cannot be used as configured: missing, unreadable, empty, damaged or not matching the model."""


class RecipeError(StratumError):
    """A recipe that cannot be run as written."""


class CheckpointError(StratumError):
    """A checkpoint that cannot be written, trusted or loaded."""


class NumericsError(StratumError):
    """Training or an evaluation produced NaN or infinity."""

    status = 3
    """Apart from 2: recipe and checkpoints are usable. Never tried again by itself: the same steps would follow."""


class BackendError(StratumError):
    """The configured backend or device is not usable on this machine."""


USER_ERRORS: tuple[type[Exception], ...] = (StratumError,)


def refuse(problems: Iterable[Problem], error: type[StratumError] = RecipeError) -> None:
    """Raise `error` with every problem, a line or more each; does nothing if there are none."""
    lines = [str(problem) for problem in problems]
    if lines:
        raise error("\n".join(dict.fromkeys(lines)))
