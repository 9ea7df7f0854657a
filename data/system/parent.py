"""A process that ends together with the one that started it."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""prctl(2)."""


def end_with_parent() -> bool:
    """Have Linux send SIGTERM to this process when its parent dies, however that happens. -> whether that works here."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM)) == 0
