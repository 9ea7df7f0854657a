"""Events that end a run: stop signals (also without enough time to save), and non-finite values."""

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
"""Signals this soon after the first count as the same one: the terminal and a launcher, or Slurm and torchrun, both send it."""
SECOND_SIGNAL_STATUS = 1
"""Exit status after a second signal."""


class StopSignals:
    """Turns Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) and SIGHUP into a request to stop at the next step boundary.

    If SIGHUP is ignored, as under nohup, it stays ignored.
    Used as a context manager in the main thread; it restores the previous handlers. A second signal, a second or more after
    the first, ends the process at once with status 1, even in a blocked collective, because a thread receives it. The
    newest whole checkpoint is not touched.
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # launch.local.rank blocks it until here
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
        """Seconds since the first signal; 0 before it."""
        return time.monotonic() - self._received_at if self.received is not None else 0.0


def _listen(reader: int) -> None:
    """Exit at a second signal. Python runs handlers only in the main thread, between bytecodes, so a blocked collective delays
    them; the byte that `signal.set_wakeup_fd` writes arrives at once."""
    first: float | None = None
    while number := os.read(reader, 1):
        if number[0] not in WATCHED:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first >= ECHO_S:
            os._exit(SECOND_SIGNAL_STATUS)
    os.close(reader)


def grace_warning(step_s: float, *, save_s: float, grace_s: float, before_end_s: float) -> str | None:
    """A warning if a step and a save do not fit between a warning signal and the kill; None if they fit.

    grace_s: launch.grace_s, after any signal; before_end_s: launch.slurm.save_before_end_s, after the SIGUSR1 that Slurm sends
    before a job's time limit.
    """
    needed = step_s + save_s
    sent, field = "SIGTERM or SIGUSR1", f"launch.grace_s={grace_s:g}"
    if needed <= grace_s:
        sent, field = "SIGUSR1, before a job's time limit,", f"launch.slurm.save_before_end_s={before_end_s:g}"
        if needed <= before_end_s:
            return None
    return (
        f"a step ({step_s:.0f} s) and a save ({save_s:.0f} s) take longer than {field} allows after {sent}: a run that gets "
        f"this signal would be killed before it has saved. Give it more time, or make steps shorter. Earlier checkpoints are "
        f"safe."
    )


def too_late(since_s: float, *, save_s: float | None, grace_s: float, step: int, saved_step: int) -> str | None:
    """A warning if another save would not finish before the kill; None if it would, or if there was no save to time yet.

    since_s: since the signal. save_s: duration of the last save. The run then ends normally at `saved_step`.
    """
    if save_s is None or saved_step == step or since_s + save_s <= grace_s:
        return None
    return (
        f"{since_s:.0f} s of the {grace_s:g} s after the signal have passed, and the last save took {save_s:.0f} s: step "
        f"{step:,} is not saved, the last saved step is {saved_step:,}. To lose no steps, raise launch.grace_s "
        f"(launch.slurm.save_before_end_s)."
    )


def check_grad_norm(step: int, *, grad_norm: float, advice: Callable[[], str]) -> None:
    """Raise NumericsError if the gradient norm of a step was not finite, because its update has corrupted the weights.

    advice: returns what the user can do; called on every rank.
    """
    if not math.isfinite(grad_norm):
        raise NumericsError(
            f"step {step}: the gradient norm is {grad_norm}. The weights of this process are invalid and will not be saved. "
            f"{advice()}"
        )


def check_losses(not_finite: tuple[int, float] | None, *, advice: Callable[[], str]) -> None:
    """Raise NumericsError if the loss of a step was NaN or infinite, even if its gradients were finite.

    not_finite: the first such step and its loss (`Telemetry.not_finite`), the same on every rank. advice: see `check_grad_norm`.
    """
    if not_finite is not None:
        step, loss = not_finite
        raise NumericsError(
            f"step {step}: the training loss is {loss}, though its gradients are finite. Nothing is saved after that step. "
            f"{advice()}"
        )


def check_scores(
    step: int, scores: dict[str, float], *, advice: Callable[[], str], measure: str = "bits per byte"
) -> None:
    """Raise NumericsError if an evaluation gave NaN or infinity for any source. advice: see `check_grad_norm`."""
    wrong = {name: score for name, score in scores.items() if not math.isfinite(score)}
    if wrong:
        named = ", ".join(f"{name} {score}" for name, score in list(wrong.items())[:3])
        raise NumericsError(
            f"step {step}: held-out {measure} are not finite for {len(wrong)} of {len(scores)} sources ({named}): the "
            f"model's outputs overflow or contain NaN. {advice()}"
        )
