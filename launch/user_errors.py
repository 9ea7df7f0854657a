"""Ends a command of `launch` with a message instead of a traceback for errors of the user and of the operating system."""

import os
import sys
from collections.abc import Callable

from recipes.schema.errors import StratumError
from recipes.schema.messages import complain, describe_system_error


def exit_status(job: Callable[[], int]) -> int:
    """Run a command. -> its exit status. After an error that a user can cause, print one message on stderr and return 2.

    A closed pipe (`stratum status | head`) and Ctrl-C end the command without a message.
    """
    try:
        status = job()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # otherwise the interpreter prints an error when it exits
        return 1
    except KeyboardInterrupt:
        return 130
    except StratumError as error:
        return complain(error)
    except OSError as error:
        return complain(describe_system_error(error))
