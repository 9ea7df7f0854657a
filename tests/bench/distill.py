"""`python -m tests.bench.distill`: the cost of training with an online teacher, as a multiple of plain training.

One process, untrained weights (time does not depend on them): the student of `tiny_gemma2_distill` and the teacher of
`tiny_teacher`, or other recipes. Per round, in turn: a next-token step, the teacher's forward pass alone (its head too, in
chunks), a distillation step. Target: distillation <= next-token + teacher forward, plus 10 %.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train.megatron  # noqa: F401  readies Megatron before anything imports it

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_recipe import composed

from data.batch import Batch
from recipes.schema.checkpoint import CheckpointConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from recipes.schema.recipe import Recipe
from train.build import build_engine, check, mesh_of
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.distill.soft_targets import OnlineTargets
from train.distill.teacher import open_teacher
from train.engine import Engine
from train.record.stopwatch import Stopwatch
from train.step import train_step


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="tiny_gemma2_distill")
    parser.add_argument("--teacher", default="tiny_teacher")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of the process, on a busy machine"
    )
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    teacher = recipe_from_mapping(composed(parsed.teacher))
    with tempfile.TemporaryDirectory() as folder:
        path = _saved(teacher, Path(folder))
        student = recipe_from_mapping(composed(parsed.student))
        objective = replace(student.objective, teacher=str(path), trust_tokenizer=True)
        seconds = _measure(replace(student, objective=objective), rounds=parsed.rounds, clock=parsed.clock)
    plain, forward, distil = (min(times) for times in seconds)
    tokens = student.run.global_rows * student.data.row_tokens
    print(
        f"{parsed.student}, {tokens:,} tokens a step, {parsed.threads} threads, {parsed.clock} time, "
        f"shortest (median) of {parsed.rounds}:"
    )
    names = ("next-token step", "teacher forward", "distillation step")
    for name, times in zip(names, seconds, strict=True):
        print(f"  {name:18} {min(times) * 1e3:8.1f} ms ({statistics.median(times) * 1e3:.1f})")
    print(
        f"distillation / next-token: x{distil / plain:.2f}; / (next-token + teacher forward): x{distil / (plain + forward):.3f}"
    )
    return 0


def _saved(recipe: Recipe, folder: Path) -> Path:
    with mesh_of(recipe, check(recipe, world=1), device=torch.device("cpu"), rank=0) as mesh:
        engine = build_engine(recipe, mesh)
        return CheckpointFolder(folder, CheckpointConfig()).save(
            engine, RunState(step=1, position=1, recipe=recipe_mapping(recipe))
        )


def _measure(recipe: Recipe, *, rounds: int, clock: str) -> tuple[list[float], list[float], list[float]]:
    assert recipe.parallel == ParallelConfig()
    now = time.perf_counter if clock == "wall" else time.process_time
    plain = replace(recipe, objective=replace(recipe.objective, kind="next_token"))
    with mesh_of(recipe, check(recipe, world=1), device=torch.device("cpu"), rank=0) as mesh:
        engines = [build_engine(plain, mesh), build_engine(recipe, mesh)]
        teacher = open_teacher(recipe, mesh=mesh, tokenizer=None)
        assert teacher is not None
        rng = np.random.default_rng(0)
        rows = torch.from_numpy(
            rng.integers(0, recipe.model.vocab, (recipe.run.global_rows, recipe.data.row_tokens + 1))
        )
        size = recipe.run.microbatch_rows
        batches = [
            Batch(
                part[:, :-1].contiguous(),
                part[:, 1:].contiguous(),
                None,
                torch.zeros(size, dtype=torch.int32),
                np.arange(size),
            )
            for part in rows.split(size)
        ]

        def step(engine: Engine) -> Callable[[], None]:
            return lambda: void(train_step(engine, batches, step=0, learning_rate=1e-3, watch=Stopwatch()))

        def forward() -> None:
            for batch in batches:
                (hidden,) = teacher.hidden(batch.tokens, None)
                targets = OnlineTargets(hidden.flatten(0, 1), teacher.head)
                for start in range(0, batch.tokens.numel(), 256):
                    torch.log_softmax(targets.logits(slice(start, start + 256), temperature=1.0), dim=1)

        work = [step(engines[0]), forward, step(engines[1])]
        seconds: tuple[list[float], list[float], list[float]] = ([], [], [])
        for round_ in range(rounds + 2):
            for act, times in zip(work, seconds, strict=True):
                started = now()
                act()
                if round_ >= 2:
                    times.append(now() - started)
        return seconds


def void(_result: object) -> None:
    """Drops a result."""


if __name__ == "__main__":
    sys.exit(main())
