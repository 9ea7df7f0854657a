"""A process that does the imports of all ranks once, and forks each rank from itself: a start costs a fork instead of imports.

    launcher --starts--> `python -m launch.local.warm_process DESCRIPTOR MODULE ...`      imports the modules, then says so
             --words, environment, two descriptors for output--> fork --> the rank: launch.local.rank in its own session
             <--process id, and later its exit status--

It stays for the launcher's life, so the ranks of a restart need no imports either, and uses no processor time meanwhile. If it
dies, its ranks get SIGTERM, and the launcher starts the next ranks in the ordinary way. It refuses to fork if a module has
started threads or made a CUDA context. `launch local` uses it without GPUs only: whether the imports call CUDA on a machine that
has it was not tried.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data.system.imports import collector_paused
from data.system.parent import end_with_parent
from launch.children import python_module
from launch.local import rank

_MOST_BYTES = 1 << 20
_POLL_S = 0.05
MODULE = "launch.local.warm_process"


class WarmProcess:
    """The launcher's side. Use it as a context manager; ranks that still run at the exit get SIGTERM."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        """modules: what to import, by name. environment: that of the ranks, without their numbers."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._statuses: dict[int, int] = {}
        self._handles: dict[int, int] = {}
        """pidfd of each rank: readable when it has ended."""
        self._is_ready = False
        with theirs:
            self._process = subprocess.Popen(
                python_module(MODULE, str(theirs.fileno()), *modules),
                env={**environment, "OMP_NUM_THREADS": "1", rank.LAUNCHER: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    def __enter__(self) -> "WarmProcess":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._channel.close()
        self._process.kill()  # it may be in the middle of its imports, which take seconds
        self._process.wait()
        for pid in list(self._handles):
            self._close(pid)

    def _close(self, pid: int) -> None:
        if (handle := self._handles.pop(pid, None)) is not None:
            os.close(handle)

    @property
    def has_died(self) -> bool:
        """Whether it could fork and is gone: its ranks got SIGTERM."""
        return self._is_ready and self._process.poll() is not None

    def is_ready(self, *, until: Callable[[], bool]) -> bool:
        """Wait for the imports. -> whether ranks can be forked: False if it has died, or `until` returned True first."""
        while not self._is_ready and not until():
            if not self._receive(_POLL_S) and self._process.poll() is not None:
                break
        return self._is_ready and self._process.poll() is None

    def fork(self, words: Sequence[str], environment: Mapping[str, str], *, stdout: int, stderr: int) -> "ForkedRank":
        """Start a rank: `python -m launch.local.rank WORDS`. stdout, stderr: descriptors that it inherits. OSError if the process
        has died."""
        request = json.dumps({"words": list(words), "environment": dict(environment)})
        socket.send_fds(self._channel, [request.encode()], [stdout, stderr])
        before = set(self._statuses)
        deadline = time.monotonic() + 60
        while True:
            message = self._message(_POLL_S)
            if message is not None and "forked" in message:
                pid = int(message["forked"])
                with contextlib.suppress(ProcessLookupError):  # it has ended already: its status follows
                    self._handles[pid] = os.pidfd_open(pid)
                return ForkedRank(pid, self)
            if message is None and (self._process.poll() is not None or time.monotonic() > deadline):
                raise ChildProcessError(f"{MODULE} did not fork ({len(before)} ranks have ended)")

    def status_of(self, pid: int, *, wait: bool) -> int | None:
        """Exit status of a rank, as subprocess has it; None while it runs. If the warm process has died, nobody knows the status:
        then it is that of SIGKILL, when the rank has saved and ended."""
        while pid not in self._statuses:
            received = self._receive(_POLL_S if wait else 0.0)
            if not received and self._process.poll() is not None and self._has_ended(pid, _POLL_S if wait else 0.0):
                return -signal.SIGKILL
            if not received and not wait:
                return None
        return self._statuses[pid]

    def _has_ended(self, pid: int, timeout_s: float) -> bool:
        """Whether a rank has ended, also if nobody has waited for it; within the time."""
        handle = self._handles.get(pid)
        return handle is None or bool(select.select([handle], [], [], timeout_s)[0])

    def _receive(self, timeout_s: float) -> bool:
        return self._message(timeout_s) is not None

    def _message(self, timeout_s: float) -> dict[str, int] | None:
        """Wait for one message, and note what it says. None without one."""
        self._channel.settimeout(timeout_s)
        try:
            text = self._channel.recv(_MOST_BYTES)
        except (BlockingIOError, TimeoutError, ConnectionError):
            return None
        if not text:
            return None
        message: dict[str, int] = json.loads(text)
        self._is_ready = self._is_ready or "ready" in message
        if "ended" in message:
            self._statuses[message["ended"]] = message["status"]
            self._close(message["ended"])
        return message


class ForkedRank:
    """A rank that a WarmProcess has forked, with the parts of Popen's interface that the launcher uses."""

    def __init__(self, pid: int, warm: WarmProcess) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._warm = warm

    def poll(self) -> int | None:
        """Exit status; None while it runs."""
        if self.returncode is None:
            self.returncode = self._warm.status_of(self.pid, wait=False)
        return self.returncode

    def wait(self) -> int:
        """Wait for its end. -> exit status."""
        if self.returncode is None:
            self.returncode = self._warm.status_of(self.pid, wait=True)
        assert self.returncode is not None, "it has ended"
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass(frozen=True)
class _Request:
    words: list[str]
    environment: dict[str, str]
    stdout: int
    stderr: int


def main() -> None:
    """Entry point of the process; in each forked rank it returns from the loop and becomes the rank."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    end_with_parent()
    if os.getppid() != int(os.environ[rank.LAUNCHER]):
        sys.exit(1)  # the launcher died before the call above
    with collector_paused():
        for module in sys.argv[2:]:
            importlib.import_module(module)
    if not _can_fork():
        sys.exit(1)
    gc.collect()
    gc.freeze()  # the collector does not write to these objects, so their pages stay shared
    request = _serve(channel)
    if request is not None:
        _become(request)
        rank.main()


def _can_fork() -> bool:
    """Whether a fork of this process works: one thread, and no CUDA context. (pyarrow's allocator has a thread outside of Python,
    which it stops and starts around a fork.)"""
    torch = sys.modules.get("torch")
    return threading.active_count() == 1 and not (torch is not None and torch.cuda.is_initialized())


def _serve(channel: socket.socket) -> _Request | None:
    """Fork ranks and report their ends until the launcher closes its end: None. In a forked rank: what it was started for."""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        channel.send(json.dumps({"ready": os.getpid()}).encode())
        while True:
            for key, _ in selector.select():
                if key.data is not None:  # a rank's pidfd is readable when it has ended
                    _, status = os.waitpid(key.data, 0)
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    channel.send(json.dumps({"ended": key.data, "status": os.waitstatus_to_exitcode(status)}).encode())
                    continue
                text, descriptors, _, _ = socket.recv_fds(channel, _MOST_BYTES, 2)
                if not text:
                    return None
                pid = os.fork()
                if pid == 0:
                    for other in selector.get_map().values():
                        os.close(other.fd)
                    channel.detach()
                    return _Request(**json.loads(text), stdout=descriptors[0], stderr=descriptors[1])
                for descriptor in descriptors:
                    os.close(descriptor)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                channel.send(json.dumps({"forked": pid}).encode())


def _become(request: _Request) -> None:
    """Give this forked process the session, output, environment and arguments of a rank."""
    os.setsid()
    os.dup2(request.stdout, 1)
    os.dup2(request.stderr, 2)
    os.close(request.stdout)
    if request.stderr != request.stdout:
        os.close(request.stderr)
    os.environ.clear()
    os.environ.update(request.environment)
    os.environ[rank.LAUNCHER] = str(os.getppid())
    sys.argv = ["launch.local.rank", *request.words]


if __name__ == "__main__":
    main()
