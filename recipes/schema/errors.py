"""Errors a user can cause. Each message gives value, place and remedy, so that no traceback is needed."""

from collections.abc import Iterable
from dataclasses import dataclass

from recipes.schema.credentials import without_credentials


@dataclass(frozen=True)
class Problem:
    """A reason why a recipe cannot run, as a rule returns it (`recipes.schema.rules`)."""

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
    """Base of the errors below, which end a command with one message and an exit status."""

    status = 2
    """The user must change something first, so launchers do not restart the run."""


class DataError(StratumError):
    """Data that cannot be used as configured: missing, unreadable, empty, damaged or not matching the model."""


class RecipeError(StratumError):
    """A recipe that cannot be run as written."""


class CheckpointError(StratumError):
    """A checkpoint that cannot be written, trusted or loaded."""


class NumericsError(StratumError):
    """Training or an evaluation produced NaN or infinity."""

    status = 3
    """Not 2, because recipe and checkpoints are usable. Launchers do not restart the run: it would repeat the same steps."""


class CorruptionError(StratumError):
    """A rank computed or stored wrong numbers. The message and `suspects.jsonl` in the run's folder name its host."""

    status = 4
    """A machine is at fault, not the recipe. Launchers do not restart: the newest checkpoint may contain its numbers."""


class BackendError(StratumError):
    """The configured backend or device is not usable on this machine."""


USER_ERRORS: tuple[type[Exception], ...] = (StratumError,)


def refuse(problems: Iterable[Problem], error: type[StratumError] = RecipeError) -> None:
    """Raise `error` with every problem, one or more lines each. Do nothing if there are no problems."""
    lines = [str(problem) for problem in problems]
    if lines:
        raise error("\n".join(dict.fromkeys(lines)))
