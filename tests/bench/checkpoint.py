"""`make bench-checkpoint`: what saving and loading cost, against the disk's own speed and torch.distributed.checkpoint.

python -m tests.bench.checkpoint [--hidden 768] [--rounds 3] [--folder FOLDER]

One process, one thread of computing (what a save does beside it has another core). Every round does everything in turn, four
times, on the same folder: a plain file of the same bytes written and synced, then read after its pages were dropped; our save
with fingerprints and without (in turn first and second) and load; torch's. Then steps, with a save beside them and without.
The first round does not count. A save ends when it is durable; deleting the one before it, or the plain file, or torch's, is
not in it. Medians, and the best of all: other work on the machine only ever adds. The state is that of a training run: fp32
weights and two moments.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, override
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from tiny import RECIPE, engine_of, steps_of

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from recipes.schema.recipe import Recipe
from train.checkpoint import fingerprint, storage, writing
from train.checkpoint.files import bytes_of
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.engine import Engine

BESIDE = 6
"""Steps measured with a save beside them, and without."""
TURNS = 4
"""Times a round saves and loads each way."""


def recipe_of(hidden: int) -> Recipe:
    model = replace(
        RECIPE.model, pattern="M-*-M-*-", hidden=hidden, ffn=4 * hidden, heads=hidden // 64, kv_heads=hidden // 64,
        head_dim=64, mamba_heads=hidden // 32, mamba_head_dim=64, mamba_state=64, mamba_groups=1, vocab=256,
    )  # fmt: skip
    return replace(RECIPE, model=model, run=replace(RECIPE.run, global_rows=4, microbatch_rows=4))


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Have the next read ask the disk."""
    for path in [folder] if folder.is_file() else folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def take_memory(folder: Path, buffer: torch.Tensor) -> None:
    """Have free memory for the page cache at hand: a virtual machine's host may have taken back what is long free."""
    path = folder / "scratch"
    with path.open("wb", buffering=0) as stream:
        stream.write(bytes_of(buffer))
    path.unlink()


def write_plainly(path: Path, buffer: torch.Tensor) -> None:
    with path.open("wb", buffering=0) as stream:
        view = bytes_of(buffer)
        while view:
            view = view[stream.write(view) :]
        os.fsync(stream.fileno())


def read_plainly(path: Path, buffer: torch.Tensor) -> None:
    with path.open("rb", buffering=0) as stream:
        view = bytes_of(buffer)
        while view and (got := stream.readinto(view)):
            view = view[got:]


class Unverified(writing._Verifier):
    """Reads nothing back, and gives every piece the fingerprint of nothing."""

    @override
    def _verify(self, handle: int) -> None:
        self.sums.extend(fingerprint.ZERO for _ in self._plan.pieces)


@contextmanager
def no_fingerprints(checkpoints: CheckpointFolder) -> Iterator[None]:
    """Saves inside are neither fingerprinted nor read back; what they leave cannot be loaded."""
    checkpoints._memory.clear()
    with mock.patch.object(writing, "_Verifier", Unverified):
        yield
    checkpoints._memory.clear()


class Torch:
    """torch.distributed.checkpoint over the same tensors."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        snapshot = storage.snapshot_of(engine, RunState())
        self.state = {piece.label: piece.data for piece in snapshot.pieces}
        self.folder = folder

    def save(self) -> None:
        dcp.save(self.state, checkpoint_id=self.folder, no_dist=True)

    def load(self) -> None:
        dcp.load(self.state, checkpoint_id=self.folder, no_dist=True)

    def stall(self) -> tuple[float, float]:
        """Seconds an asynchronous save holds the caller, and seconds until it is done."""
        started = time.perf_counter()
        future = dcp.async_save(self.state, checkpoint_id=self.folder)
        held = time.perf_counter() - started
        future.result()  # type: ignore[union-attr]
        return held, time.perf_counter() - started


def measure(recipe: Recipe, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    seconds: dict[str, list[float]] = defaultdict(list)
    with engine_of(recipe, rank=0, world=1) as engine:
        steps_of(engine, recipe, range(2))
        checkpoints = CheckpointFolder(folder / "ours", replace(recipe.checkpoint, keep_last=1, retries=0))
        theirs = Torch(engine, folder / "theirs")
        size = sum(tensor.numel() * tensor.element_size() for tensor in theirs.state.values())
        plain = folder / "plain"
        buffer = torch.empty(size, dtype=torch.uint8).random_()
        step, saves = 2, 0

        def request(*, background: bool) -> None:
            nonlocal saves
            saves += 1
            checkpoints.request(engine, RunState(step=saves, position=0, data_hash="h"), background=background)

        def saved() -> dict[str, Any]:
            events = checkpoints.collect()
            checkpoints.check(always=True)
            return next(event.fields for event in events if event.kind == "save")

        def steps(count: int) -> float:
            nonlocal step
            held = 0.0

            def wait() -> None:
                nonlocal held
                held += timed(checkpoints.before_update)

            steps_of(engine, recipe, range(step, step + count), before_update=wait)
            step += count
            return held

        def once(turn: int) -> None:
            take_memory(folder, buffer)
            seconds["plain write"].append(timed(lambda: write_plainly(plain, buffer)))
            forget(plain)
            seconds["plain read"].append(timed(lambda: read_plainly(plain, buffer)))
            plain.unlink()

            for proven in (True, False) if turn % 2 else (False, True):
                take_memory(folder, buffer)
                with nullcontext() if proven else no_fingerprints(checkpoints):
                    took = timed(lambda: request(background=False))
                fields = saved()
                seconds["save" if proven else "save, unproven"].append(fields["seconds"])
                seconds["deleting"].append(took - fields["seconds"])
                if proven:
                    for part, lasted in fields["parts"].items():
                        seconds[f"save: {part}"].append(lasted)
                    seconds["fingerprint CPU"].append(fields["fingerprint_cpu_s"])
                    path = checkpoints.path_of(saves)
                    forget(path)
                    seconds["load"].append(timed(partial(checkpoints.load, engine, path)))

            take_memory(folder, buffer)
            seconds["torch save"].append(timed(theirs.save))
            forget(theirs.folder)
            seconds["torch load"].append(timed(theirs.load))
            shutil.rmtree(theirs.folder)

        for number in range(rounds + 1):
            if number == 1:
                seconds.clear()  # memory and page cache are there now
            for turn in range(TURNS):
                once(turn)

            seconds["steps alone"].append(timed(lambda: steps(BESIDE)))
            take_memory(folder, buffer)
            started = time.perf_counter()
            held = timed(lambda: request(background=True))
            held += steps(BESIDE)
            seconds["steps beside a save"].append(time.perf_counter() - started)
            seconds["held"].append(held)
            checkpoints.wait()
            fields = saved()
            seconds["background save"].append(fields["seconds"])
            for part, lasted in fields["parts"].items():
                seconds[f"background: {part}"].append(lasted)
            take_memory(folder, buffer)
            held, done = theirs.stall()
            seconds["torch held"].append(held)
            seconds["torch background"].append(done)
            shutil.rmtree(theirs.folder)
    return seconds, size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, help="width of the model; the state grows with its square")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="disk to measure (a folder on it)")
    parsed = parser.parse_args()
    warnings.filterwarnings("ignore")
    parsed.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parsed.folder) as work:
        seconds, size = measure(recipe_of(parsed.hidden), Path(work), parsed.rounds)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    best = {name: min(values) for name, values in seconds.items()}

    table = Table(box=None, title=f"{size / 1e6:,.0f} MB of training state")
    for column in ("what", "median", "best", "GB/s", "share of", "median", "best", "target"):
        table.add_column(column, justify="left" if column in ("what", "share of", "target") else "right")
    for what, name, of, target in (
        ("plain write and fsync", "plain write", "", ""),
        ("our save, verified", "save", "plain write", ">= 0.7"),
        ("torch's save", "torch save", "plain write", ""),
        ("plain read", "plain read", "", ""),
        ("our load, verified", "load", "plain read", ">= 0.7"),
        ("torch's load", "torch load", "plain read", ""),
    ):
        shares = [f"{each[of] / each[name]:.2f}" if of else "" for each in (middle, best)]
        rate = f"{size / middle[name] / 1e9:.2f}"
        table.add_row(what, f"{middle[name]:.3f}", f"{best[name]:.3f}", rate, of, *shares, target)
    for each in (middle, best):
        each["proof"] = each["save"] - each["save, unproven"]
    middle["slower"] = middle["steps beside a save"] - middle["steps alone"]
    best["slower"] = best["steps beside a save"] - best["steps alone"]
    for what, name, of, target in (
        ("saves longer by fingerprints, reading back", "proof", "save", "<= 10 %"),
        ("their processor time, on another core", "fingerprint CPU", "save", ""),
        ("loop held by a background save", "held", "save", "<= 5 %"),
        (f"{BESIDE} steps slower beside it", "slower", "save", ""),
        ("loop held by torch's async_save", "torch held", "torch save", ""),
    ):
        shares = [f"{100 * each[name] / each[of]:.1f} %" for each in (middle, best)]
        table.add_row(what, f"{middle[name]:.3f}", f"{best[name]:.3f}", "", of, *shares, target)
    console = Console(highlight=False, width=120)
    console.print(table)
    for kind in ("save", "background"):
        parts = [f"{name.split(': ')[1]} {took:.3f}" for name, took in middle.items() if name.startswith(f"{kind}: ")]
        console.print(f"parts of our {kind}, seconds: {', '.join(parts)}")
    console.print(f"not in a save: deleting the checkpoint before it {middle['deleting']:.3f} s")
    console.print(
        f"a step {middle['steps alone'] / BESIDE:.2f} s; background save {middle['background save']:.2f} s, torch's "
        f"{middle['torch background']:.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
