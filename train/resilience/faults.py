"""What can go wrong around a step: signals that ask the run to stop, too little time to do so, and numbers that are none."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from recipes.schema.errors import NumericsError

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a run to save and stop. SIGHUP: the terminal was closed."""
ECHO_S = 1.0
"""Signals this soon after the first are the same warning: a launcher and the terminal, or Slurm and torchrun, send both."""
GIVEN_UP = 1
"""Exit status of a process that a second signal ended."""


class StopSignals:
    """Turns Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) and SIGHUP into a request to stop at the next step boundary.

    SIGHUP stays ignored where it is, as under nohup.
    Used as a context manager in the main thread; the previous handlers come back at its end. A second signal, a second or
    more after the first, ends the process at once with status 1, even while it is stuck in a collective: a thread hears of
    it. The newest whole checkpoint stays what it was.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_wakeup = -1

    def __enter__(self) -> "StopSignals":
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._pipe = reader, writer
        self._previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in WATCHED:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_wakeup)
        assert self._pipe is not None
        os.close(self._pipe[1])  # the thread reads the end and closes its own side

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._received_at = time.monotonic()

    @property
    def since_s(self) -> float:
        """Seconds since the first signal; 0 while there was none."""
        return time.monotonic() - self._received_at if self.received is not None else 0.0


def _listen(reader: int) -> None:
    """Python runs handlers in the main thread, between its instructions; the system's byte in the pipe comes at once."""
    first: float | None = None
    while number := os.read(reader, 1):
        if number[0] not in WATCHED:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first >= ECHO_S:
            os._exit(GIVEN_UP)
    os.close(reader)


def grace_warning(step_s: float, *, save_s: float, grace_s: float, before_end_s: float) -> str | None:
    """What to say where a step and a save do not fit into the time between a warning signal and the kill.

    grace_s: launch.grace_s, after any signal; before_end_s: launch.slurm.save_before_end_s, after the SIGUSR1 that Slurm sends
    before a job's time limit.
    """
    needed = step_s + save_s
    heard, field = "SIGTERM or SIGUSR1", f"launch.grace_s={grace_s:g}"
    if needed <= grace_s:
        heard, field = "SIGUSR1, before a job's time limit,", f"launch.slurm.save_before_end_s={before_end_s:g}"
        if needed <= before_end_s:
            return None
    return (
        f"a step ({step_s:.0f} s) and a save ({save_s:.0f} s) take longer than {field} leaves after {heard}: a run that is "
        f"told to stop would be killed before it has saved. Give it more time, or smaller steps; the checkpoints before are safe."
    )


def too_late(since_s: float, *, save_s: float | None, grace_s: float, step: int, saved_step: int) -> str | None:
    """What to say where another save would not end before the kill; None where it would, or nothing is known.

    since_s: since the signal. save_s: what the last save took. The run then ends in order at the step that is saved.
    """
    if save_s is None or saved_step == step or since_s + save_s <= grace_s:
        return None
    return (
        f"{since_s:.0f} s of the {grace_s:g} s after the signal are gone, and the last save took {save_s:.0f} s: step "
        f"{step:,} is not saved any more, step {saved_step:,} is. Raise launch.grace_s (launch.slurm.save_before_end_s) to "
        f"lose no steps."
    )


def check_numbers(step: int, *, grad_norm: float, advice: Callable[[], str]) -> None:
    """Raise NumericsError when the gradient of a step was not finite: its update has spoilt the weights.

    advice: what to do then, called on every rank.
    """
    if not math.isfinite(grad_norm):
        raise NumericsError(
            f"step {step}: the gradient norm is {grad_norm}. The weights of this process are spoilt and will not be saved. "
            f"{advice()}"
        )


def check_scores(step: int, scores: dict[str, float], *, advice: Callable[[], str]) -> None:
    """Raise NumericsError when an evaluation gave NaN or infinity for any source. advice: see `check_numbers`."""
    wrong = {name: score for name, score in scores.items() if not math.isfinite(score)}
    if wrong:
        named = ", ".join(f"{name} {score}" for name, score in list(wrong.items())[:3])
        raise NumericsError(
            f"step {step}: held-out bits per byte are not finite for {len(wrong)} of {len(scores)} sources ({named}): the "
            f"model's logits overflow or hold NaN. {advice()}"
        )
