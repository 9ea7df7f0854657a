"""A training run that is started several times, each time until its end or a SIGKILL: the real `train.run.train` on forked ranks
and real prepared data.

run = Run(recipe, world, folder=...)
run.attempt(Kill(steps=3, delay_s=0.01))     start it and kill it in its fourth step
run.attempt(None)                            start it and let it finish
"""

import os
import pickle
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ranks import start_ranks
from shards import random_documents, write_folder
from tiny import RECIPE

from recipes.schema.data import DataConfig, SourceConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, read_metrics
from train.checkpoint.manifest import read_manifest
from train.record import machine
from train.run import train

Contents = dict[str, str]
"""Fingerprint of every weight, moment and random state of a checkpoint, by name."""


def recipe_in(folder: Path, *, steps_: int) -> Recipe:
    """A hybrid of three layers with its own data in `folder`, saved after every step."""
    write_folder(
        folder / "data", {"one": [random_documents(steps_ * 2, seed=1)], "two": [random_documents(60, seed=2)]}
    )
    sources = {name: SourceConfig(path="made by hand") for name in ("one", "two")}
    return replace(
        RECIPE,
        run=replace(
            RECIPE.run, name="killed", folder=str(folder), steps=steps_, global_rows=2, microbatch_rows=1, deterministic=True
        ),
        model=replace(
            RECIPE.model, pattern="M*-", hidden=32, ffn=64, heads=2, kv_heads=2, head_dim=16, mamba_heads=4,
            mamba_head_dim=8, mamba_state=8, mamba_groups=2, mamba_chunk=8, vocab=300,
        ),
        data=DataConfig(folder=str(folder / "data"), row_tokens=16, sources=sources, heldout_fraction=0.1),
        schedule=replace(RECIPE.schedule, warmup=2, decay=4),
        checkpoint=replace(RECIPE.checkpoint, every_steps=1, keep_last=2),
        evaluate=replace(RECIPE.evaluate, every_steps=0, rows_per_source=1),
        telemetry=replace(RECIPE.telemetry, log_every_steps=1, tensorboard=False, progress=False),
    )  # fmt: skip


def contents_at(path: Path) -> Contents:
    """The contents of a checkpoint by its manifest."""
    return {name: record.fingerprint for name, record in read_manifest(path).tensors.items()}


@dataclass(frozen=True)
class Kill:
    """When to kill: `delay_s` after `steps` steps are finished or, with steps=None, after the processes were started.
    rank: killed first, the others `apart_s` later (None: all at once)."""

    steps: int | None
    delay_s: float
    rank: int | None = None
    apart_s: float = 0.0


class Run:
    """A run that is started several times."""

    def __init__(self, recipe: Recipe, world: int, *, folder: Path) -> None:
        """folder: for the ranks' output and results."""
        self.recipe, self.world = recipe, world
        self.folder = Path(recipe.run.folder) / recipe.run.name
        self._said = folder
        folder.mkdir()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / METRICS
        return read_metrics(path) if path.exists() else []

    def attempt(self, kill: Kill | None) -> bool:
        """Start the run and wait for its end, or kill it. -> whether it was killed."""
        path = self.folder / METRICS
        before = path.stat().st_size if path.exists() else 0
        children = start_ranks(self.world, run_once, self.recipe, self._said / "output", folder=self._said)
        if kill is None:
            deaths = [os.waitpid(pid, 0)[1] for pid in children]
            assert not any(deaths), self._last_words()
            return False
        try:
            if kill.steps is not None:
                self._wait_for(kill.steps, before, children)
            time.sleep(kill.delay_s)
        finally:
            order = sorted(children, key=lambda pid: children[pid] != kill.rank)
            for number, pid in enumerate(order):
                if number == 1 and kill.rank is not None:
                    time.sleep(kill.apart_s)
                os.kill(pid, signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in order]
        return statuses[0] == -signal.SIGKILL

    def _last_words(self) -> str:
        """What the ranks printed, and how they ended."""
        ends = [str(pickle.loads(path.read_bytes())) for path in sorted(self._said.glob("*.pickle"))]
        return "\n".join([(self._said / "output").read_text()[-4000:], *ends])

    def _wait_for(self, count: int, start: int, children: dict[int, int]) -> None:
        """Wait until this start has recorded its first event and `count` steps, or has ended."""
        path = self.folder / METRICS
        deadline = time.monotonic() + 60
        while True:
            new = path.read_bytes()[start:] if path.exists() else b""
            if new.count(b'"kind": "step"') >= count and (b'"kind": "resume"' in new or b'"kind": "start"' in new):
                return
            if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in children):
                return
            assert time.monotonic() < deadline, (self._said / "output").read_text()[-4000:]
            time.sleep(0.001)


def run_once(rank: int, recipe: Recipe, output: Path) -> None:
    """One rank of one start."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    machine.peak_flops = lambda _device: 1e11  # type: ignore[assignment]  # measuring it takes half of the run's time
    train(recipe)
