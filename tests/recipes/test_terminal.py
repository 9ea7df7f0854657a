"""Help, plans, fields, status and doctor on narrow terminals: real ones of 40 and 80 columns, and none."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from train.command_list import COMMANDS


def printed_on(columns: int, words: list[str], *, folder: Path | None = None, is_ok: bool = True) -> str:
    """What `stratum WORDS` prints on a terminal so wide."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "train.stratum", *words], cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal,
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
    assert process.wait(60) == 0 or not is_ok
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


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize(
    "command",
    [
        "plan -cn smoke",
        "plan -cn nemotron_nano_12b_v2 --gpus 736 --goodput",
        "plan -cn tiny_moe --gpus 8 --search",
        "fields optim data",
        "status",
        "doctor",
    ],
)
def test_answers_fit_the_terminal(command: str, columns: int, tmp_path: Path) -> None:
    """No line is wider, except for single words and commands to copy; no number or word is cut or broken; no colours."""
    for name, steps in (("first", 7), ("a_run_with_a_name", 30)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").write_text("run: {steps: 30}\n")
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(
            "".join(
                f'{{"kind": "step", "step": {n}, "loss": 2.5, "tokens_per_s": 10, "time": {n}}}\n'
                for n in range(1, steps + 1)
            )
        )
    text = re.sub(r"\x1b\[[01]m", "", printed_on(columns, command.split(), folder=tmp_path, is_ok=command != "doctor"))
    wide = [line for line in text.split("\n") if len(line.rstrip()) > columns and len(line.split()) > 1]
    assert not [line for line in wide if "parallel." not in line], text
    assert "…" not in text and "\x1b" not in text, text
    expected = {
        "plan -cn smoke": "2.35",  # GiB in the column `total`, which 80 columns have no room for as a table
        "status": "a_run_with_a_name",
        "fields optim data": "ema_decay",
        "doctor": "megatron-core",
    }
    assert expected.get(command, "") in text
