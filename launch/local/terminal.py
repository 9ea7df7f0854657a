"""Output of the processes that are shown live: unchanged to the terminal, and without control codes to their log files.

    rank --pseudo-terminal or two pipes--> Output.pump() --+--> the launcher's stdout and stderr, unchanged (with progress bars)
                                                           +--> rank-00000.log, without control codes

All other ranks write their log files themselves. It uses one thread and does not buffer shown output.
"""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import tty
from pathlib import Path
from typing import BinaryIO

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b\][^\x07]*\x07")
_CHUNK = 65536


class Output:
    """Live output of one process. `stdout` and `stderr` are for the process; call `close_child_ends` after its start."""

    def __init__(self, log: Path, *, prefix: str = "", use_terminal: bool = False) -> None:
        """prefix: printed before each shown line, if several processes are shown. use_terminal: give the process a
        pseudo-terminal, so that it draws its progress bar."""
        self._log = log.open("ab", buffering=0)
        self._prefix = prefix.encode()
        self._size: os.terminal_size | None = None
        self._master: int | None = None
        self._streams: dict[int, _Stream] = {}
        if use_terminal:
            self._master, slave = pty.openpty()
            tty.setraw(slave)  # the real terminal converts line ends
            self.stdout = self.stderr = slave
            self._streams[self._master] = _Stream(sys.stderr.buffer, self._prefix)
            self._follow_size()
        else:
            out, self.stdout = os.pipe()
            err, self.stderr = os.pipe()
            self._streams = {
                out: _Stream(sys.stdout.buffer, self._prefix),
                err: _Stream(sys.stderr.buffer, self._prefix),
            }
        for descriptor in self._streams:
            os.set_blocking(descriptor, False)

    def close_child_ends(self) -> None:
        """Close this process's copies of the child's write ends."""
        for descriptor in {self.stdout, self.stderr}:
            os.close(descriptor)

    def descriptors(self) -> list[int]:
        """Descriptors to wait on for new output."""
        return list(self._streams)

    def pump(self) -> None:
        """Forward the output that has arrived. Never waits."""
        self._follow_size()
        for descriptor, stream in list(self._streams.items()):
            while True:
                try:
                    data = os.read(descriptor, _CHUNK)
                except BlockingIOError:
                    break
                except OSError:  # the other end of a pseudo-terminal was closed
                    data = b""
                if not data:
                    os.close(descriptor)
                    del self._streams[descriptor]
                    break
                stream.show(data)
                with contextlib.suppress(OSError):
                    self._log.write(stream.clean(data))

    def close(self) -> None:
        """Forward the rest and close."""
        self.pump()
        for descriptor, stream in self._streams.items():
            os.close(descriptor)
            with contextlib.suppress(OSError):
                self._log.write(stream.rest())
        self._streams.clear()
        with contextlib.suppress(OSError):  # a full disk must not end the launcher
            self._log.close()

    def _follow_size(self) -> None:
        """Give the pseudo-terminal the size of the real one."""
        if self._master is None or self._master not in self._streams:
            return
        try:
            size = os.get_terminal_size(sys.stderr.fileno())
        except OSError:
            return
        if size != self._size:
            self._size = size
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))


class _Stream:
    """One stream: unchanged to the screen, complete lines without control codes to the log."""

    def __init__(self, screen: BinaryIO, prefix: bytes) -> None:
        self._screen = screen
        self._prefix = prefix
        self._at_line_start = True
        self._line = b""

    def show(self, data: bytes) -> None:
        if self._prefix:
            lines = data.splitlines(keepends=True)
            data = b"".join((self._prefix if i or self._at_line_start else b"") + line for i, line in enumerate(lines))
            self._at_line_start = lines[-1].endswith(b"\n")
        with contextlib.suppress(OSError, ValueError):  # a closed terminal must not stop the run
            self._screen.write(data)
            self._screen.flush()

    def clean(self, data: bytes) -> bytes:
        """The lines that `data` completes, as they finally appeared on the screen."""
        *whole, rest = (self._line + data).split(b"\n")
        self._line = rest.rpartition(b"\r")[2] if len(rest) > _CHUNK else rest
        return b"".join(_as_seen(line) + b"\n" for line in whole)

    def rest(self) -> bytes:
        return _as_seen(self._line) + b"\n" if self._line else b""


def _as_seen(line: bytes) -> bytes:
    """A line without control codes and without text that a carriage return overwrote."""
    return _CONTROL.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]
