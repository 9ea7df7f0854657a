"""Starts the processes of a run on this machine, watches them, and ends them: one attempt, from the first start to the last exit.

    command x N --> ranks (own sessions, logs) --> wait --> AttemptEnd(status, failures)
                                                    |  a signal: forwarded once; SIGKILL after grace_s, or after a second signal
                                                    |  a rank fails: the others have SETTLE_S to end by themselves

The processes see the same as under torchrun: the same variables, and a rendezvous by address and port. Two things differ, because
torchrun loses work there: it has one timeout for both the save after a signal and ranks that hang because a peer has died; and it
loses the exit status of a failed rank (it is always 1), so that an error in the recipe is retried like a hardware failure.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch.local.continuation import STOPPED, shell_status
from launch.local.failures import STACK_S, STACK_SIGNAL, RankFailure, by_cause, first_failure, log_of, read_failures
from launch.local.ports import reserved_port
from launch.local.rank import LAUNCHER, LOGS, RANK_LOG
from launch.local.terminal import Output
from launch.local.warm_process import ForkedRank, WarmProcess
from launch.runs import RunFolder

SETTLE_S = 2.0
"""Seconds after the first failure: enough for the other ranks to notice it and write their error, short enough for a restart."""
_POLL_S = 0.05


class StopRequest:
    """Records signals that ask the launcher to stop, while the context is open. SIGHUP (terminal closed) counts as SIGTERM."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number)
        self.received.append(signal.SIGTERM if name == signal.SIGHUP else name)

    def wait(self, seconds: float) -> bool:
        """Sleep until the time is over or a signal arrives. -> whether a signal has arrived."""
        deadline = time.monotonic() + seconds
        while not self.received and time.monotonic() < deadline:
            time.sleep(min(_POLL_S, seconds))
        return bool(self.received)


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended."""

    status: int
    """0 if all ranks succeeded; 128 + the signal's number if a signal stopped them; else that of the rank that failed first."""
    failures: list[RankFailure]
    """Ranks that failed, causes first, without ranks that the launcher killed because of them."""
    hung: list[int] = field(default_factory=list)
    """Ranks that the launcher killed because they did not end; their logs have their stacks."""
    may_grow: bool = False
    """The ranks saved and stopped at `grow_at`."""

    def failed_at(self, *, timeout_s: float) -> float | None:
        """When the first rank failed or, if ranks waited for one that hung, when they began to wait; None without a failure."""
        return first_failure(self.failures, timeout_s=timeout_s)


def say(text: str) -> None:
    """Write one message of the launcher to stderr. A closed terminal must not stop the run."""
    with contextlib.suppress(OSError, ValueError):
        line = "\r\x1b[2K" if sys.stderr.isatty() else ""  # clears a progress bar of the processes
        sys.stderr.write(f"{line}launch: {text}\n")
        sys.stderr.flush()


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes] | ForkedRank
    output: Output | None


@dataclass(frozen=True)
class Node:
    """This machine's place among the nodes of a world."""

    number: int
    count: int
    address: str
    """Host name or address of node 0."""
    port: int
    """Port of the rendezvous on node 0."""


def run_attempt(
    command: Sequence[str],
    *,
    processes: int,
    environment: Mapping[str, str],
    logs: Path,
    shown: frozenset[int],
    grace_s: float,
    stop: StopRequest,
    use_terminal: bool,
    warm: WarmProcess | None = None,
    node: Node | None = None,
    grow_at: float | None = None,
) -> AttemptEnd:
    """Run `command` as `processes` ranks of one world until all have ended. When it returns, no rank is left.

    command: `launch.children.python_module("launch.local.rank", ...)`. warm: forks the ranks, if it can. logs: a new folder.
    node: of a world of several nodes, each of which has as many processes; None: this machine is the world.
    grow_at: by time.monotonic, when the ranks save and stop so that more can start.
    shown: ranks whose output is also shown live. use_terminal: draw progress bars (if one rank is shown).
    """
    logs.mkdir(parents=True)
    if warm is not None and not warm.is_ready(until=lambda: bool(stop.received)):
        warm = None
    if stop.received:
        return AttemptEnd(128 + stop.received[0], [])
    ranks: list[_Rank] = []
    with contextlib.ExitStack() as world:
        place = node or Node(0, 1, "127.0.0.1", world.enter_context(reserved_port()))
        world.callback(_end, ranks)
        for local in range(processes):
            number = place.number * processes + local
            variables = {
                "RANK": str(number),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(processes * place.count),
                "LOCAL_WORLD_SIZE": str(processes),
                "GROUP_RANK": str(place.number),
                "MASTER_ADDR": place.address,
                "MASTER_PORT": str(place.port),
                LOGS: str(logs),
                LAUNCHER: str(os.getpid()),
            }
            ranks.append(
                _start(
                    command,
                    number,
                    environment={**environment, **variables},
                    log=log_of(logs, number),
                    prefix=f"[{number}] " if len(shown) > 1 else "",
                    is_shown=number in shown,
                    use_terminal=use_terminal,
                    warm=warm,
                )
            )
        return _Watch(ranks, logs=logs, grace_s=grace_s, stop=stop, grow_at=grow_at).until_end()


def _end(ranks: list[_Rank]) -> None:
    """Kill all processes of the world, including processes that a rank has started."""
    for rank in ranks:
        _kill(rank)
        rank.process.wait()
        if rank.output:
            rank.output.close()


class _Watch:
    """Watches the ranks of one attempt until the last exit."""

    def __init__(
        self, ranks: list[_Rank], *, logs: Path, grace_s: float, stop: StopRequest, grow_at: float | None = None
    ) -> None:
        self._running = list(ranks)
        self._logs = logs
        self._grace_s = grace_s
        self._stop = stop
        self._grow_at = grow_at
        self._is_growing = False
        self._forwarded: signal.Signals | None = None
        self._stopped_status: int | None = None
        self._failures: dict[int, RankFailure] = {}
        self._deadline: float | None = None
        self._is_killing = False
        self._hung: list[int] = []

    def until_end(self) -> AttemptEnd:
        """Watch until no rank is running."""
        while self._running:
            self._pump()
            for rank in list(self._running):
                if (returncode := rank.process.poll()) is not None:
                    self._running.remove(rank)
                    self._note_end(rank, returncode)
            if not self._is_killing:
                self._forward_signals()
                if self._deadline is not None and time.monotonic() > self._deadline:
                    if not self._failures:
                        say(
                            f"still running {self._grace_s:g} s after the signal (launch.grace_s): killed. "
                            f"{self._what_is_saved()}"
                        )
                    self._write_stacks()
                    self._kill()
        records = {failure.rank: failure for failure in read_failures(self._logs)}
        failures = by_cause(self._logs, [records.get(rank, own) for rank, own in self._failures.items()])
        stopped = self._stopped_status or 0
        if self._forwarded and self._is_killing:
            stopped = 128 + self._forwarded
        may_grow = self._is_growing and not failures and not self._is_killing
        return AttemptEnd(failures[0].status if failures else stopped, failures, self._hung, may_grow)

    def _note_end(self, rank: _Rank, returncode: int) -> None:
        status = shell_status(returncode)
        if returncode == 0 or self._is_killing:
            return
        stop_requested = self._forwarded is not None and status == 128 + self._forwarded
        if stop_requested or (returncode > 0 and status in STOPPED):
            self._stopped_status = status
            self._end_within(self._grace_s)
        else:
            self._failures[rank.number] = RankFailure(rank.number, status, time.time())
            self._end_within(SETTLE_S)

    def _forward_signals(self) -> None:
        """Send the first signal to every rank, only once: a second one would end a rank before it has saved."""
        received = self._stop.received
        is_due = self._grow_at is not None and time.monotonic() > self._grow_at and not self._failures
        if received and self._forwarded is None:
            say(f"{received[0].name}: the processes finish their step, save and stop. A second signal kills them.")
            self._forward(received[0])
        elif is_due and self._forwarded is None:
            self._is_growing = True
            self._forward(signal.SIGUSR1)
        elif len(received) > 1:
            say(f"{received[1].name} again: killed. {self._what_is_saved()}")
            self._kill()

    def _forward(self, number: signal.Signals) -> None:
        self._forwarded = number
        for rank in self._running:
            rank.process.send_signal(number)
        self._end_within(self._grace_s)

    def _what_is_saved(self) -> str:
        """Text about what is lost by killing the ranks: nothing if the last step is already saved."""
        run = RunFolder(self._logs.parent.parent)
        saved, progress = run.checkpoint_step(), run.progress()
        if progress is not None and progress.step == saved:
            return f"Nothing is lost: the last step, {saved:,}, is saved."
        return f"The newest checkpoint is {run.newest_checkpoint() or 'none yet'}."

    def _end_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def _write_stacks(self) -> None:
        """Let ranks that do not end write where they are."""
        self._hung = [rank.number for rank in self._running]
        for rank in self._running:
            rank.process.send_signal(STACK_SIGNAL)
        deadline = time.monotonic() + STACK_S
        while time.monotonic() < deadline:
            self._pump()

    def _kill(self) -> None:
        self._is_killing = True
        for rank in self._running:
            _kill(rank)

    def _pump(self) -> None:
        """Forward the output that has arrived; wait up to _POLL_S for the first."""
        outputs = [rank.output for rank in self._running if rank.output]
        descriptors = [descriptor for output in outputs for descriptor in output.descriptors()]
        if not descriptors:
            time.sleep(_POLL_S)
            return
        select.select(descriptors, [], [], _POLL_S)
        for output in outputs:
            output.pump()


def _start(
    command: Sequence[str],
    number: int,
    *,
    environment: Mapping[str, str],
    log: Path,
    prefix: str,
    is_shown: bool,
    use_terminal: bool,
    warm: WarmProcess | None,
) -> _Rank:
    """Start one rank in its own session, so that Ctrl-C in the terminal reaches only the launcher, which forwards it once."""
    if not is_shown:
        with log.open("ab") as stream:
            out = stream.fileno()
            return _Rank(number, _process(command, environment, stdout=out, stderr=out, warm=warm), None)
    output = Output(log, prefix=prefix, use_terminal=use_terminal)
    environment = {**environment, RANK_LOG: str(log)}
    try:
        process = _process(command, environment, stdout=output.stdout, stderr=output.stderr, warm=warm)
    finally:
        output.close_child_ends()
    return _Rank(number, process, output)


def _process(
    command: Sequence[str], environment: Mapping[str, str], *, stdout: int, stderr: int, warm: WarmProcess | None
) -> subprocess.Popen[bytes] | ForkedRank:
    if warm is not None:
        words = command[command.index("-m") + 2 :]
        with contextlib.suppress(OSError):  # it has died: an ordinary start is slower, nothing else
            return warm.fork(words, environment, stdout=stdout, stderr=stderr)
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def _kill(rank: _Rank) -> None:
    """SIGKILL a rank and the processes it has started, also after the rank itself has ended."""
    try:
        os.killpg(rank.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        rank.process.send_signal(signal.SIGKILL)  # just forked by the warm process: it has no group of its own yet
    except PermissionError:
        return
