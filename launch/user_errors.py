"""What ends a command of `launch` without a traceback: errors that its user can remove, and refusals of the operating system."""

import os
import sys
from collections.abc import Callable

from recipes.schema.command import of_the_machine
from recipes.schema.errors import StratumError
from recipes.schema.messages import complain


def exit_status(job: Callable[[], int]) -> int:
    """Run a command. -> its exit status; after an error that a user can remove: one message on stderr, and 2.

    A closed pipe (`stratum status | head`) and Ctrl-C end the command without a message.
    """
    try:
        status = job()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it exits
        return 1
    except KeyboardInterrupt:
        return 130
    except StratumError as error:
        return complain(error)
    except OSError as error:
        return complain(of_the_machine(error))
