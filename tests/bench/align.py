"""`python -m tests.bench.align` (`make bench-align`): the speed of alignment next to pretraining's, on equal rows.

One process, untrained weights (time does not depend on them), real rows: chats that `stratum prepare` packed. Blocks of steps
take turns (ours, theirs, theirs, ours, ...), because the machine's speed drifts. Compare figures of one table only.

    sft     SFT against pretraining on every token of the same rows with the same documents. Goal: 0.97 of its tokens/s
    dpo     DPO against SFT on the same rows: its reference cached, and with the time of the reference, which reads each row once.
            Goal: at most 2.1 times the time of a step
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import train.megatron  # noqa: F401  readies Megatron before anything imports it

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import road_data
from chats import tokenizer_file
from rich.console import Console
from test_recipe import composed

from data.batch import Batch
from data.dataset import open_dataset
from data.prepare import prepare
from recipes.schema.data import SourceConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from train.align.dpo import log_prob_step
from train.build import build_engine, build_objective, check, mesh_of
from train.engine import Engine, run_schedule
from train.evaluate.deal import evaluating
from train.record.stopwatch import Stopwatch
from train.step import train_step

Row = tuple[str, str]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_CHAT_TOKENS = 15
"""A chat has more."""


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--recipe", default="tiny_sft", help="the shape, and the rows of a step")
    parser.add_argument("--rows", type=int, help="rows of a step, instead of the recipe's")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--block", type=int, default=5, help="steps of a block")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: seconds of the process, on a busy machine"
    )
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    recipe = recipe_from_mapping(composed(parsed.recipe))
    if parsed.rows:
        recipe = replace(recipe, run=replace(recipe.run, global_rows=parsed.rows, microbatch_rows=parsed.rows))
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row for name in PARTS if parsed.part in (name, "all") for row in PARTS[name](recipe, parsed, Path(folder))
        ]
    tokens = recipe.run.global_rows * recipe.data.row_tokens
    print(
        f"{parsed.recipe}: {tokens:,} tokens a step, {parsed.threads} threads, {parsed.clock} time, "
        f"{parsed.rounds} pairs of {parsed.block} steps\n"
    )
    print("| | |\n|---|---|")
    for name, text in rows:
        print(f"| {name} | {text} |")
    return 0


def sft(recipe: Recipe, options: argparse.Namespace, folder: Path) -> list[Row]:
    """SFT and pretraining: the same rows with and without the mask."""
    batches = _chats(recipe, folder, steps=options.block)
    learned = [batch.learned for batch in batches if batch.learned is not None]
    share = sum(int(mask.sum()) for mask in learned) / sum(mask.numel() for mask in learned)
    with _engine(recipe) as engine:
        ours, theirs = in_turn(
            options.rounds,
            CLOCKS[options.clock],
            lambda: _train(engine, batches),
            lambda: _train(engine, [replace(batch, learned=None) for batch in batches]),
        )
    return [
        *_speeds(recipe, options, {"SFT": ours, "pretraining": theirs}),
        (
            "SFT / pretraining, tokens/s",
            f"{_ratio(theirs, ours)} (goal 0.97); {100 * share:.0f} % of the labels learned",
        ),
    ]


def dpo(recipe: Recipe, options: argparse.Namespace, folder: Path) -> list[Row]:
    """A step of DPO, the reference's pass over its rows, and a step of SFT on all answers of the same rows."""
    batches = [_with_reference(batch) for batch in _pairs(recipe, folder, steps=options.block)]
    objective = replace(recipe.objective, kind="dpo")
    with _engine(recipe) as engine:
        built = build_objective(replace(recipe, objective=objective), mesh=engine.mesh, chunks=[], tokenizer=None)
        prefers = replace(engine, forward_step=built.forward_step, counter=built.counter, loss_parts=built.parts)
        texts = [replace(batch, ranks=None, groups=None, reference=None) for batch in batches]
        step, reference, theirs = in_turn(
            options.rounds,
            CLOCKS[options.clock],
            lambda: _train(prefers, batches),
            lambda: _read(engine, batches),
            lambda: _train(engine, texts),
        )
    whole = [sum(parts) for parts in zip(step, reference, strict=True)]
    return [
        *_speeds(recipe, options, {"DPO, reference cached": step, "SFT on the same rows": theirs}),
        ("DPO / SFT, time of a step", f"{_ratio(step, theirs)} (goal at most 2.1)"),
        ("the same with the reference's pass", _ratio(whole, theirs)),
    ]


PARTS: dict[str, Callable[[Recipe, argparse.Namespace, Path], list[Row]]] = {"sft": sft, "dpo": dpo}
"""Measures of each part. GRPO is measured next to TRL (tests/bench/grpo.py)."""


def in_turn(rounds: int, clock: Callable[[], float], *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each of `works`, `rounds` times in turn, each first in turn; a first round does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for index, work in sorted(enumerate(works), reverse=bool(number % 2)):
            started = clock()
            work()
            if number:
                seconds[index].append(clock() - started)
    return seconds


@contextmanager
def _engine(recipe: Recipe) -> Iterator[Engine]:
    with mesh_of(recipe, check(recipe, world=1), device=torch.device("cpu"), rank=0) as mesh:
        yield build_engine(recipe, mesh)


def _chats(recipe: Recipe, folder: Path, *, steps: int) -> list[Batch]:
    """The rows of the first steps, of chats that are prepared into a folder."""
    chats = road_data.chats(random.Random(road_data.SEED))
    return _rows(recipe, folder, chats, kind="chat", steps=steps)


def _pairs(recipe: Recipe, folder: Path, *, steps: int) -> list[Batch]:
    """The same of preferences, of several seeds: one has too few."""
    pairs = chain.from_iterable(road_data.pairs(random.Random(seed)) for seed in count())
    return _rows(recipe, folder, pairs, kind="preference", steps=steps)


def _rows(
    recipe: Recipe,
    folder: Path,
    records: Iterable[road_data.Record],
    *,
    kind: Literal["chat", "preference"],
    steps: int,
) -> list[Batch]:
    tokens = steps * recipe.run.global_rows * recipe.data.row_tokens
    path = folder / f"{kind}.jsonl"
    lines = (json.dumps(record) + "\n" for record in islice(records, max(100, tokens // _CHAT_TOKENS)))
    path.write_text("".join(lines))
    data = replace(
        recipe.data,
        folder=str(folder / kind),
        sources={kind: SourceConfig(path=str(path), kind=kind)},
        tokenizer=replace(recipe.data.tokenizer, path=str(tokenizer_file())),
        workers=1,
    )
    prepare(data, console=Console(quiet=True))
    dataset, rows = open_dataset(data), recipe.run.global_rows
    return [dataset.training_rows(np.arange(step * rows, (step + 1) * rows)) for step in range(steps)]


def _train(engine: Engine, steps: list[Batch]) -> None:
    """Train on the rows of some steps."""
    size = engine.microbatch_rows
    for step, rows in enumerate(steps):
        microbatches = [rows.part(start, start + size) for start in range(0, len(rows.tokens), size)]
        train_step(engine, microbatches, step=step, learning_rate=1e-3, watch=Stopwatch())


def _read(engine: Engine, steps: list[Batch]) -> None:
    """The reference's pass over the rows of some steps: forward only."""
    size = engine.microbatch_rows
    with evaluating(engine.chunks):
        for rows in steps:
            microbatches = [rows.part(start, start + size) for start in range(0, len(rows.tokens), size)]
            run_schedule(engine, microbatches, forward_step=log_prob_step(engine.mesh), forward_only=True)


def _with_reference(batch: Batch) -> Batch:
    """The batch with log-probabilities of a reference; time does not depend on their values."""
    assert batch.ranks is not None
    return replace(batch, reference=torch.full(batch.ranks.shape, -10.0, dtype=torch.float64))


def _speeds(recipe: Recipe, options: argparse.Namespace, seconds: dict[str, list[float]]) -> list[Row]:
    tokens = options.block * recipe.run.global_rows * recipe.data.row_tokens
    return [(name, f"{tokens / statistics.median(spent):,.0f} tokens/s") for name, spent in seconds.items()]


def _ratio(numerator: list[float], denominator: list[float]) -> str:
    """Median of the pairs' ratios, with the middle half of them."""
    ratios = [above / below for above, below in zip(numerator, denominator, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} (middle half of {len(ratios)} pairs: {low:.3f} to {high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
