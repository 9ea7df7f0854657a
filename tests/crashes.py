"""Kill a save, or make it fail, at any of its disk operations; and a small training run for such tests.

with acts_of_saves(lambda act: ...): ...      called before each write, fsync, rename, unlink, mkdir, rmdir of a save
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tiny import RECIPE, engine_of, steps_of

from data.system import disk
from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import Manifest, RunState, read_manifest

ACTS = ("writev", "fsync", "rename", "unlink", "mkdir", "rmdir")


@dataclass(frozen=True)
class Act:
    """A disk operation that is about to be done."""

    number: int
    """From 0, in this process."""
    name: str
    target: str


class _Trapped:
    """Stands in for the `os` that data.system.disk uses."""

    def __init__(self, before: Callable[[Act], object]) -> None:
        self._before, self._count = before, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ACTS:
            return real

        def act(*arguments: Any) -> Any:
            target = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else arguments[0]
            act = Act(self._count, name, str(target))
            self._count += 1
            try:
                self._before(act)
            except Half:  # die in the middle of a write
                os.write(arguments[0], bytes(arguments[1][0])[: len(arguments[1][0]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return act


class Half(Exception):
    """Raised by a trap: write half of the buffer, then die."""


@contextmanager
def acts_of_saves(before: Callable[[Act], object]) -> Iterator[None]:
    disk.os = _Trapped(before)  # type: ignore[assignment]
    try:
        yield
    finally:
        disk.os = os


SMALL = replace(
    RECIPE,
    model=replace(
        RECIPE.model, pattern="M*-", hidden=32, ffn=64, heads=2, kv_heads=2, head_dim=16, mamba_heads=4, mamba_head_dim=8,
        mamba_state=8, vocab=256,
    ),
    checkpoint=replace(RECIPE.checkpoint, every_steps=2, keep_last=2, retries=0, retry_wait_s=0.0),
)  # fmt: skip


def train_on(
    rank: int,
    world: int,
    folder: Path,
    steps: int,
    recipe: Recipe = SMALL,
    trap: Callable[[int, Act], None] | None = None,
    log: Path | None = None,
) -> tuple[int, str]:
    """For `run_ranks`: resume, train to `steps`, save in the background when due. -> the first step, and the resume's notes.

    trap(rank, act): called before each disk operation of a save. log: gets one line a step, "rank pid step".
    """
    with engine_of(recipe, rank=rank, world=world) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        with acts_of_saves(lambda act: trap(rank, act) if trap else None):
            found = checkpoints.resume(engine)
            begin = found.manifest.step if found else 0
            for step in range(begin, steps):
                steps_of(engine, recipe, range(step, step + 1), before_update=checkpoints.before_update)
                if checkpoints.is_due(step + 1):
                    checkpoints.request(engine, RunState(step=step + 1, position=4 * (step + 1), data_hash="h"))
                if log is not None:
                    with log.open("a") as stream:
                        stream.write(f"{rank} {os.getpid()} {step + 1}\n")
                torch.distributed.barrier()
            checkpoints.wait()
            checkpoints.check()
        return begin, "\n".join(found.notes if found else [])


def contents(folder: Path) -> dict[int, dict[str, str]]:
    """Fingerprint of every weight and moment of each published checkpoint, by step."""
    return {
        manifest.step: {
            name: record.fingerprint for name, record in manifest.tensors.items() if not name.startswith("random.")
        }
        for manifest in map(read_manifest, sorted(folder.glob("step_*")))
    }


def manifest_at(folder: Path, step: int) -> Manifest:
    return read_manifest(folder / f"step_{step:08d}")
