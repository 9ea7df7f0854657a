"""Rewards of answers from a verifier in a child process. Whatever the verifier does, a reward or a named failure comes back.

    Judge(verifier).rewards(samples) --> [Reward(0.5), Reward(None, "timed out after 5 s"), ...]

A verifier that hangs or dies is killed with all processes it started, and started again for the next sample. A user's own
function runs only with `run_code`; it then has the rights of this user. Nothing else in a recipe or in data can name code.
"""

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from data.system.closing import Closing
from recipes.schema.errors import BackendError, DataError, RecipeError
from recipes.schema.foreign import printable
from train.align.verify.sample import Sample
from train.align.verify.verifier import check_verifier

_START_S = 120.0
"""Until a verifier is ready: imports of sympy or of the user's module on a busy machine."""
_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What a verifier may use."""

    seconds: float = 5.0
    """For one answer."""
    memory_bytes: int = 4 << 30
    """Address space of its process."""


@dataclass(frozen=True)
class Reward:
    """The reward of an answer; None if the verifier failed, and why."""

    value: float | None
    failure: str = ""
    what: str = ""
    """Kind of failure, as in `Judge.failures`."""


class Judge(Closing):
    """One verifier in a child process. Use it as a context manager: at the end the process is gone."""

    def __init__(self, verifier: Mapping[str, Any], *, run_code: bool = False, limits: Limits = Limits()) -> None:
        """Check the verifier and start it. run_code: the user allowed a function of their own, on the command line.

        Raises DataError or BackendError if it cannot be opened, RecipeError for a function without permission.
        """
        self.kind = check_verifier(verifier)
        if self.kind == "function" and not run_code:
            raise RecipeError(
                f"the verifier {printable(str(verifier['name']), most=100)} is code of your own, which runs with your rights. "
                f"If you trust it, allow it on the command line."
            )
        self.failures: Counter[str] = Counter()
        """How often the verifier failed, by what happened: raised, timed out, ended, did not start, not a number, out of
        range, not judged."""
        self.lost_s = 0.0
        """Seconds spent so far on samples that made the verifier hang or end, with its start right before such a sample."""
        self._verifier, self._limits = dict(verifier), limits
        self._child: subprocess.Popen[bytes] | None = None
        self._results = -1
        self._range = (0.0, 1.0)
        self._rest = b""
        self._start()

    def rewards(self, samples: Sequence[Sample], *, lost_seconds: float = math.inf) -> list[Reward]:
        """The reward of each sample, in order. lost_seconds: how long samples may hang or end the verifier, together
        (`lost_s`); after that it is not started again, and the samples that are left get no reward."""
        most = self.lost_s + lost_seconds
        return [
            self.not_judged() if self._child is None and self.lost_s >= most else self._reward(sample)
            for sample in samples
        ]

    def not_judged(self) -> Reward:
        """The reward of a sample for which there was no time left."""
        return self._failed("not judged", "was not asked, because other answers of the batch made it hang or end")

    def close(self) -> None:
        """End the child process."""
        if self._child is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)  # also processes that the verifier started
        self._child.wait()
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()
        os.close(self._results)
        self._child, self._results, self._rest = None, -1, b""

    def _start(self) -> None:
        try:
            self._child, results = self._opened()
        except OSError as error:  # no memory, processes or descriptors left
            raise BackendError(
                f"the verifier {self.kind} did not start: {error.strerror or error}. Use fewer ranks on this machine, or raise "
                f"its limits."
            ) from error
        self._results = results
        message = self._ask({"verifier": self._verifier, "memory_bytes": self._limits.memory_bytes}, seconds=_START_S)
        if "ready" in message:
            low, high = message["ready"]
            self._range = low, high
            return
        self.close()
        if "refused" in message:
            raise {"BackendError": BackendError}.get(message["error"], DataError)(message["refused"])
        raise DataError(f"the verifier {self.kind} did not start: it {message['failed']}. It may need more memory.")

    def _opened(self) -> tuple[subprocess.Popen[bytes], int]:
        """(the child process, the descriptor of its results). OSError if there is no room for them."""
        results, child_end = os.pipe()
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "train.align.verify.worker", str(child_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[child_end],
                start_new_session=True,
            )
        except OSError:
            os.close(results)
            raise
        finally:
            os.close(child_end)
        return child, results

    def _reward(self, sample: Sample) -> Reward:
        began = time.monotonic()
        found = self._judged(sample)
        if self._child is None:
            self.lost_s += time.monotonic() - began
        return found

    def _judged(self, sample: Sample) -> Reward:
        if self._child is None:
            try:
                self._start()
            except (DataError, BackendError) as error:  # it started before: the machine may be short of memory
                return self._failed("did not start", f"did not start again: {error}")
        message = self._ask(asdict(sample), seconds=self._limits.seconds)
        match message:
            case {"value": value} if not math.isfinite(value):
                return self._failed("not a number", f"gave {value}")
            case {"value": value} if not self._range[0] <= value <= self._range[1]:
                return self._failed("out of range", f"gave {value:g}, outside {self._range[0]:g} to {self._range[1]:g}")
            case {"value": value}:
                return Reward(float(value))
            case {"type": name}:
                return self._failed("not a number", f"gave {printable(str(name), most=100)}, not a number")
            case {"raised": text}:
                return self._failed("raised", f"raised {printable(str(text), most=300)}")
        self.close()
        return self._failed(message["failed"].split(" after")[0], message["failed"])

    def _failed(self, what: str, why: str) -> Reward:
        self.failures[what] += 1
        return Reward(None, f"verifier {self.kind} {why}", what)

    def _ask(self, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        """Send a line and read the answer. -> the message, or {"failed": why} if none comes in time."""
        assert self._child is not None and self._child.stdin is not None
        deadline = time.monotonic() + seconds
        try:
            self._send(json.dumps(request).encode() + b"\n", deadline)
            line = self._line(deadline)
        except TimeoutError:
            return {"failed": f"timed out after {seconds:g} s"}
        except (BrokenPipeError, EOFError):
            return {"failed": "ended"}
        try:
            message = json.loads(line)
        except ValueError:
            return {"failed": "ended"}
        return message if isinstance(message, dict) else {"failed": "ended"}

    def _send(self, data: bytes, deadline: float) -> None:
        """Write all of it, also if the child does not read for a while. TimeoutError, BrokenPipeError."""
        assert self._child is not None and self._child.stdin is not None
        pipe = self._child.stdin.fileno()
        os.set_blocking(pipe, False)
        while data:
            _, ready, _ = select.select([], [pipe], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = data[os.write(pipe, data[:_LINE_BYTES]) :]

    def _line(self, deadline: float) -> bytes:
        """The next line of results. TimeoutError; EOFError if the child ended."""
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._results], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(self._results, _LINE_BYTES)
            if not data or len(self._rest) > _LINE_BYTES:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line
