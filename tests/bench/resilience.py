"""`make bench-resilience`: what copies in memory cost, and how long a return from memory and from disk takes, as Markdown tables.

python -m tests.bench.resilience [--part copies|return] [--rounds 12] [--rows 8] [--folder /dev/shm] [-- OVERRIDE ...]

copies: one process of the smoke recipe's size, one thread of computing; a copy has another core. Single steps with a copy
after each and without, in turn. The stall is the time that training waits: to prepare the copy, and for it before the update.
The rest of the difference is what the copy's thread takes of memory bandwidth and cores. Then the return from memory and from a
checkpoint of the same state, in turn; the checkpoint's pages are dropped before each read.
return: `stratum launch local` with two processes, one of which is killed. Seconds from the kill to the end of the next step, by
part. Needs the data of `make smoke`.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from tiny import engine_of, one_document_rows

from launch.children import stratum
from recipes.schema.memory_copies import MemoryCopiesConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import read_metrics
from tests.bench.__main__ import SMOKE, recipe_of
from tests.bench.checkpoint import forget, timed
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.copies.restore import open_copies, resume_from_memory
from train.record.stopwatch import Stopwatch
from train.step import train_step

WARM_UP = 1


def bench_copies(recipe: Recipe, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of each measurement (median), and bytes of a copy."""
    seconds: dict[str, list[float]] = {name: [] for name in ("with", "without", "stall", "stage", "copy")}
    returns: dict[str, list[float]] = {"memory": [], "disk": []}
    with engine_of(recipe, rank=0, world=1) as engine:
        copies = open_copies(recipe.run.memory_copies, engine.mesh, folder / "run")
        assert copies is not None
        assert copies.prepare(engine, RunState(), stream={}, used=None) is None
        both = torch.randint(0, recipe.model.vocab, (recipe.run.microbatch_rows, recipe.data.row_tokens + 1))
        batch = one_document_rows(both[:, :-1].contiguous(), both[:, 1:].contiguous())
        step = 0

        def train(*, copy: bool) -> None:
            nonlocal step
            if copy:
                copies.request(engine, RunState(step=step, position=step), stream={})
            train_step(
                engine, [batch], step=step, learning_rate=1e-3, watch=Stopwatch(), before_update=copies.before_update
            )
            step += 1

        for number in range(rounds + WARM_UP):
            for turn in (True, False) if number % 2 else (False, True):
                before = copies.stall_s
                took = timed(partial(train, copy=turn))
                copies.wait()
                if number >= WARM_UP:
                    seconds["with" if turn else "without"].append(took)
                    if turn:
                        seconds["stall"].append(copies.stall_s - before)
        copies.request(engine, RunState(step=step, position=step), stream={})
        seconds["copy"].append(timed(copies.wait))
        checkpoints = CheckpointFolder(folder / "checkpoints", recipe.checkpoint)
        path = checkpoints.save(engine, RunState(step=step - 1, position=step - 1))
        for _ in range(3):
            again = open_copies(recipe.run.memory_copies, engine.mesh, folder / "run")
            assert again is not None

            def from_memory(again: Any = again) -> None:
                found = resume_from_memory(again, checkpoints, engine, recipe=recipe, new=RunState())
                assert found.start is not None

            returns["memory"].append(timed(from_memory))
            forget(path)
            returns["disk"].append(timed(lambda: checkpoints.load(engine, path)))
        size = sum(file.stat().st_size for file in copies.place.folder.glob("rank_*.0"))
        copies.delete()
    found = {name: statistics.median(values) for name, values in (seconds | returns).items() if values}
    return found | {"bytes": size}


def show_copies(found: dict[str, float]) -> None:
    rows = (
        ("bytes of a copy", f"{found['bytes'] / 1e6:,.1f} MB"),
        ("a step without copies", f"{found['without']:.3f} s"),
        ("a step with a copy", f"{found['with']:.3f} s ({found['with'] / found['without'] - 1:+.2%})"),
        (
            "stall: training waits for a copy",
            f"{1e3 * found['stall']:.2f} ms, {found['stall'] / found['without']:.2%} of a step",
        ),
        ("a copy while nothing else runs", f"{1e3 * found['copy']:.1f} ms"),
        ("return from memory", f"{found['memory']:.3f} s"),
        ("return from disk (pages dropped)", f"{found['disk']:.3f} s"),
    )
    print("| copies in memory | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


def bench_return(folder: Path, words: list[str]) -> None:
    """Kill rank 1 of two in the middle of a run, and look at what happened when."""
    run = folder / "return"
    command = [*stratum("launch", "local", "-cn", "smoke"), "run.name=return", f"run.folder={folder}", "--nproc", "2",
               "run.threads=1", "run.microbatch_rows=4", "telemetry.log_every_steps=1", "checkpoint.every_steps=0",
               "run.steps=14", "evaluate.rows_per_source=1",
               "run.memory_copies.every_steps=1", f"run.memory_copies.folder={folder}", *words]  # fmt: skip
    started = time.time()
    with (folder / "output").open("w") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        try:
            wait_for(lambda: lines_of(run, "step")[7:], child, folder)
            owner = newest_owner(run)
            killed = time.time()
            os.kill(owner["pid"], signal.SIGKILL)
            wait_for(lambda: len(list((run / "logs").iterdir())) > 1, child, folder)
            again = time.time()
            wait_for(lambda: newest_owner(run)["pid"] != owner["pid"], child, folder)
            taken = time.time()
            status = child.wait(timeout=300)
        finally:
            child.kill()
    assert status == 0, (folder / "output").read_text()
    first = lines_of(run, "step")[0]
    resumed = next(line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "resume")
    machine = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "machine"][-1]
    back = next(line for line in lines_of(run, "step") if line["time"] > resumed["time"])
    print("| return after a kill, two processes | s |\n|---|---|")
    print(f"| first start: command to the end of the first step | {first['time'] - started:.1f} |")
    for name, value in (
        ("detection: kill to the next attempt", again - killed),
        ("fork, recipe, data, process groups: until the trainer owns the run", taken - again),
        ("model, optimizer, state from memory", machine["time"] - taken),
        ("memory for the next copies", resumed["time"] - machine["time"]),
        ("first step", back["time"] - resumed["time"]),
        ("**kill to the end of the next step**", back["time"] - killed),
    ):
        print(f"| {name} | {value:.1f} |")
    before = max(line["step"] for line in lines_of(run, "step") if line["time"] < killed)
    print(f"\nContinued after step {resumed['step']}; the last step before the kill was {before}.")


def newest_owner(run: Path) -> dict[str, Any]:
    """The process that owns the run, by its lease."""
    owner: dict[str, Any] = json.loads(max((run / "lease").glob("0*.json")).read_text())
    return owner


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [line for line in read_metrics(path) if line["kind"] == kind] if path.exists() else []


def wait_for(condition: Callable[[], object], child: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert child.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("copies", "return"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, for `copies`")
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("words", nargs="*", help="more overrides for `return`, after --")
    own = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=own.folder, prefix="bench-") as memory:
        if own.part in (None, "copies"):
            recipe = recipe_of(SMOKE)
            copies = MemoryCopiesConfig(every_steps=1, folder=memory)
            recipe = replace(
                recipe, run=replace(recipe.run, global_rows=own.rows, microbatch_rows=own.rows, memory_copies=copies)
            )
            with tempfile.TemporaryDirectory() as folder:
                show_copies(bench_copies(recipe, Path(folder), own.rounds))
        if own.part in (None, "return"):
            bench_return(Path(memory), own.words)


if __name__ == "__main__":
    main()
