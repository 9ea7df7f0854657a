"""`stratum train` and `stratum launch local` in separate processes, and what their runs recorded.

child = start(words, "name")            a new interpreter
child = fork(words, "name", ...)        the same program in a fork of this one: no imports to wait for
finish(child, status=143)
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ranks import start_ranks
from texts import VOCAB

from recipes.schema.command import RECIPES
from recipes.schema.run_folder import METRICS, read_metrics

STEPS = 24
SHAPE = [
    "model.pattern=M*-", "model.hidden=32", "model.ffn=64", "model.heads=2", "model.kv_heads=2", "model.head_dim=16",
    "model.mamba_heads=4", "model.mamba_head_dim=8", "model.mamba_state=8", f"model.vocab={VOCAB}", "model.mamba_chunk=8",
    "precision.scaling=none",
]  # fmt: skip
RUN = [
    "precision=fp32",
    f"run.steps={STEPS}", "run.global_rows=4", "run.microbatch_rows=2", "run.threads=1", "schedule.warmup=2",
    "schedule.decay=4", "checkpoint.every_steps=6", "evaluate.every_steps=0", "evaluate.rows_per_source=2",
    "telemetry.log_every_steps=1", "telemetry.tensorboard=false", "precision=fp32",
]  # fmt: skip


class Forked:
    """One or more forked ranks of `stratum train`, with the parts of Popen's interface that tests use."""

    def __init__(self, pids: list[int], output: Path) -> None:
        self.pids, self._output = pids, output
        self.statuses: dict[int, int] = {}

    @property
    def returncode(self) -> int | None:
        """Common exit status of the ended ranks, or the first that differs from rank 0's; None if none has ended."""
        known = [self.statuses[pid] for pid in self.pids if pid in self.statuses]
        return next((status for status in known if status != known[0]), known[0]) if known else None

    def poll(self) -> int | None:
        for pid in self.pids:
            if pid not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return self.returncode if len(self.statuses) == len(self.pids) else None

    def communicate(self, timeout: float = 120.0) -> tuple[str, None]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s:\n{self._output.read_text()}")
            time.sleep(0.005)
        return self._output.read_text(), None

    def send_signal(self, number: int) -> None:
        """Send a signal to all ranks."""
        for pid in self.pids:
            if pid not in self.statuses:
                os.kill(pid, number)


def fork(
    words: list[str],
    name: str,
    *,
    ranks: int = 1,
    extra: tuple[str, ...] = (),
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
    step_s: float = 0.0,
) -> Forked:
    """`stratum train words` in forked processes. within: context manager around it. step_s: added to each step's time."""
    folder = Path(tempfile.mkdtemp(prefix="forked", dir=_folder_of(words)))
    line = [*words, f"run.name={name}", *extra]
    pids = start_ranks(ranks, _command, line, folder / "output", within, step_s, folder=folder)
    return Forked(list(pids), folder / "output")


def _command(
    rank: int, words: list[str], output: Path, within: Callable[[], AbstractContextManager[None]], step_s: float
) -> None:
    from train import loop
    from train.__main__ import main

    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    real = loop.train_step
    loop.train_step = lambda *a, **k: (time.sleep(step_s), real(*a, **k))[1]
    status = 1
    try:
        with within():
            status = main(words)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _folder_of(words: list[str]) -> str:
    return next(word for word in words if word.startswith("run.folder=")).split("=", 1)[1]


def start(
    words: list[str],
    name: str,
    *,
    ranks: int = 1,
    extra: tuple[str, ...] = (),
    launcher: str = "torchrun",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """A new process. ranks: more than one are started by torchrun or `stratum launch local`. environment: more variables."""
    command = ["-m", "train"]
    if launcher == "local":
        command = ["-m", "train.stratum", "launch", "local", "--nproc", str(ranks)]
    elif ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "train"]
    return subprocess.Popen(
        [sys.executable, *command, *words, f"run.name={name}", *extra],
        cwd=RECIPES.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


Child = subprocess.Popen[str] | Forked


def finish(child: Child, status: int = 0) -> str:
    """Wait for the end. -> what was printed."""
    output, _ = child.communicate(timeout=120)
    assert child.returncode == status, output
    return output


def losses(folder: Path) -> dict[int, float]:
    """The last loss of each step."""
    return {line["step"]: line["loss"] for line in read_metrics(folder / METRICS) if line["kind"] == "step"}


def saves(folder: Path) -> list[int]:
    """Steps whose checkpoint became durable."""
    return [line["step"] for line in read_metrics(folder / METRICS) if line["kind"] == "save"]


def wait_for_step(folder: Path, step: int, child: Child, *, saved: bool = False) -> None:
    """Wait until this step is done (and, with `saved`, any checkpoint is durable)."""
    deadline = time.monotonic() + 90
    while not ((folder / METRICS).exists() and max(losses(folder), default=0) >= step and (not saved or saves(folder))):
        assert child.poll() is None, child.communicate()[0]
        if time.monotonic() > deadline:
            child.send_signal(signal.SIGTERM)  # torchrun passes it on: no process is left behind
            raise AssertionError(f"training does not get on:\n{child.communicate(timeout=60)[0]}")
        time.sleep(0.01)
