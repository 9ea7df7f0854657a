"""Help on narrow terminals: real pseudo-terminals of 40 and 80 columns, and no terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from train.command_list import COMMANDS


def printed_on(columns: int, words: list[str]) -> str:
    """What `stratum WORDS` prints on a terminal so wide."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "train.stratum", *words], stdin=terminal, stdout=terminal, stderr=terminal,
        env=environment | {"NO_COLOR": "1", "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(terminal)
    output = b""
    try:
        while piece := os.read(main, 1 << 16):
            output += piece
    except OSError:  # Linux's sign that the other end is closed
        pass
    os.close(main)
    assert process.wait(60) == 0
    return output.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", ["", "train", "plan", "status", "checkpoint", "hf"])
def test_help_fits_the_terminal(command: str, columns: int) -> None:
    """No line is wider, except for single words; no colours; no word is lost."""
    text = printed_on(columns, [*command.split(), "--help"])
    wide = [line for line in text.split("\n") if len(line) > columns and len(line.split()) > 1]
    assert not wide and "\x1b[" not in text
    whole = subprocess.run(
        [sys.executable, "-m", "train.stratum", *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    assert whole.stdout.split() == text.split() and whole.stdout.count("\n") <= text.count("\n")
    assert command or all(name in " ".join(text.split()) for name in COMMANDS)
