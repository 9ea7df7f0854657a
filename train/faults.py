"""What can go wrong around a step: signals that ask the run to stop, and numbers that are no longer numbers."""

import math
import signal
from types import FrameType

from train.errors import NumericsError

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a request to stop at the next step boundary.

    Used as a context manager; the previous handlers come back at its end. A second signal ends the process at once with
    its default action: the newest whole checkpoint stays what it was.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for watched in _WATCHED:
            signal.signal(watched, signal.SIG_DFL)


def check_numbers(step: int, *, grad_norm: float, newest_checkpoint: str | None) -> None:
    """Raise NumericsError when the gradient of a step was not finite: its update has spoilt the weights."""
    if math.isfinite(grad_norm):
        return
    back = f"Continue from {newest_checkpoint}" if newest_checkpoint else "Start again"
    raise NumericsError(
        f"step {step}: the gradient norm is {grad_norm}. The weights of this process are spoilt and will not be saved. "
        f"{back} with a lower optim.lr, a longer schedule.warmup or precision.params=fp32."
    )
