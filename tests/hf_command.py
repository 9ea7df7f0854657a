"""`stratum hf ...` in a separate process."""

import os
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  imported here, so that the processes forked below need not import it
from ranks import run_ranks
from transformers import Gemma2ForCausalLM, NemotronHForCausalLM  # noqa: F401  likewise

from train.hf import command as _command  # noqa: F401  likewise
from train.hf.__main__ import main


def call(rank: int, words: list[str], folder: Path) -> tuple[int, str]:
    """For `run_ranks`: the command in this process, its output in a file. -> exit status, output and errors."""
    os.chdir(folder)
    with (folder / f"{words[0]}.out").open("w+") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        try:
            status = main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
        stream.flush()
        stream.seek(0)
        return status, stream.read()


def command(folder: Path, *words: object) -> tuple[int, str]:
    return run_ranks(1, call, [str(word) for word in words], folder)[0]
