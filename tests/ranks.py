"""Groups of gloo ranks for tests, forked from this process: a rank costs a fork, not imports.

    results = run_ranks(4, work, argument)      # work(rank, argument) runs in 4 processes that form one world

The parent must not have process groups or busy threads when it forks; tests keep torch on one thread. A world may open its
process groups only once: if it opens them again on the same port, a rank may join the store that another is about to close,
and both wait forever (two ranks hung within five tries; torchrun's store outlives the groups).
"""

import importlib
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.local.ports import reserved_port

IN_EVERY_RANK = (
    "torch._dynamo",
    "train.parallel.wrap",
    "train.build",
    "train.loop",
    "train.evaluate.losses",
)
"""Modules that ranks import when they build a model (three quarters of a small rank's time): imported before the first fork."""


class RankFailed(AssertionError):
    """Ranks raised or died; carries their tracebacks."""


def run_ranks(world: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `work(rank, *arguments)` in `world` forked processes with torchrun's environment. -> results by rank.

    Results must pickle. Raises RankFailed with the tracebacks of the failed ranks. All processes have ended afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = start_ranks(world, work, *arguments, folder=Path(folder))
        return _collect(children, Path(folder), world, timeout_s)


def start_ranks(world: int, work: Callable[..., Any], *arguments: Any, folder: Path) -> dict[int, int]:
    """Fork the ranks and leave them running; each writes its result to `folder`/RANK.pickle. -> rank by process id."""
    for module in IN_EVERY_RANK:
        importlib.import_module(module)
    children = {}
    with reserved_port() as port:  # the ranks inherit the reservation
        for rank in range(world):
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _child(rank, world, port, folder / f"{rank}.pickle", work, arguments)
            children[pid] = rank
    return children


def _child(rank: int, world: int, port: int, out: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Runs in the child and never returns."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    status = 1
    try:
        result = ("ok", work(rank, *arguments))
        status = 0
    except BaseException:
        result = ("error", traceback.format_exc())
    try:
        out.write_bytes(pickle.dumps(result))
    finally:
        os._exit(status)


def _collect(children: dict[int, int], folder: Path, world: int, timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    failed: list[int] = []
    waiting = dict(children)
    while waiting and not (failed and time.monotonic() > deadline):
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                rank = waiting.pop(pid)
                if status:
                    failed.append(rank)
                    deadline = min(deadline, time.monotonic() + 2)  # others may be about to say why
        if not failed and time.monotonic() > deadline:
            failed.append(-1)
        time.sleep(0.005)
    for pid in waiting:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    if failed == [-1]:
        raise RankFailed(f"ranks {sorted(waiting.values())} were still running after {timeout_s} s")
    results = []
    for rank in range(world):
        path = folder / f"{rank}.pickle"
        results.append(pickle.loads(path.read_bytes()) if path.exists() else ("error", f"rank {rank} died"))
    if failed:
        raise RankFailed("\n".join(f"rank {rank}:\n{results[rank][1]}" for rank in failed))
    return [value for _, value in results]
