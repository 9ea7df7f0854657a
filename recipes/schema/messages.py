"""How a command prints an error: one message on stderr, without control characters and without credentials."""

import sys

from recipes.schema.credentials import without_credentials
from recipes.schema.errors import StratumError
from recipes.schema.foreign import printable_lines


def complain(error: object, *, head: str = "error") -> int:
    """Print an error. -> the exit status of a StratumError; 2 for other errors."""
    sys.stderr.write(f"{head}: {printable_lines(without_credentials(str(error)))}\n")
    sys.stderr.flush()
    return error.status if isinstance(error, StratumError) else 2
