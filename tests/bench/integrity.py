"""`python -m tests.bench.integrity [--rounds 8]`: what the checks for silent corruption cost, as a Markdown table.

Two data-parallel ranks of the smoke recipe's size, one thread each. A plain step, the comparison of state, the replay of a step,
a step with checked products and one with checked collectives, in turn. Medians of the processor time of a rank, averaged over
the ranks, so waiting for the other rank or for a processor does not count. The shares of the comparison and of replays are those
of the default intervals: every 25 steps, and 0.25 % of the steps.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dataclasses import replace

from ranks import run_ranks
from tiny import engine_of

from recipes.schema.integrity import IntegrityConfig
from tests.bench.__main__ import ROWS, SMOKE, batch_of, in_turn, recipe_of
from train.integrity.collectives import CollectiveWatch
from train.integrity.replay import StepReplay
from train.integrity.state import StateWatch
from train.integrity.watch import Integrity
from train.native import product_check
from train.record.stopwatch import Stopwatch
from train.step import train_step

WORLD = 2
DEFAULT = IntegrityConfig(enabled=True)
PRODUCTS = IntegrityConfig(
    enabled=True, compare_every_steps=0, replay_fraction=0.0, products=("attention", "mamba", "mlp", "experts", "output")
)  # fmt: skip
COLLECTIVES = replace(PRODUCTS, products=(), collectives=True)


def measured(rank: int, rounds: int, folder: Path) -> list[float]:
    """-> seconds of this rank's processor: step, comparison, replay of its own rows, step with products, with collectives."""
    recipe = recipe_of(SMOKE)
    recipe = replace(recipe, run=replace(recipe.run, global_rows=WORLD * ROWS, integrity=PRODUCTS))
    compared = product_check.compare

    with engine_of(recipe, rank=rank, world=WORLD) as engine:
        batch = batch_of(recipe.model.vocab)
        state = StateWatch(engine)
        own = CollectiveWatch(engine.mesh, keeps_records=False)
        replay = StepReplay(engine, collectives=own, rows=lambda _positions: batch, compares_ranks=False)

        def step(**checks: Any) -> Any:
            return train_step(engine, [batch], step=0, learning_rate=1e-3, watch=Stopwatch(), **checks)

        def compare() -> None:
            state.remember()
            assert not state.check(1)

        def watched(config: IntegrityConfig) -> Integrity:
            telemetry: Any = SimpleNamespace(event=lambda kind, **fields: sys.exit(f"a false alarm: {fields}"))
            return Integrity(
                config, engine, telemetry=telemetry, folder=folder, seed=1, rows=None, compares_ranks=False
            )

        def take(watch: Integrity) -> None:
            watch.take(
                1,
                [batch],
                before_update=lambda: None,
                train=lambda before, after: step(before_update=before, after_reduction=after),
            )

        of_products, of_collectives = watched(PRODUCTS), watched(COLLECTIVES)

        def with_products() -> None:
            product_check.compare = compared
            take(of_products)
            product_check.compare = lambda *_operands, **_named: None

        product_check.compare = lambda *_operands, **_named: None
        return in_turn(
            rounds,
            step,
            compare,
            lambda: replay.before([batch], step=1),
            with_products,
            lambda: take(of_collectives),
            clock=time.process_time,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(WORLD, measured, rounds, Path(folder), timeout_s=600)
    step_s, compare_s, own_s, products_s, collectives_s = [sum(one) / WORLD for one in zip(*ranks, strict=True)]
    compare_share = compare_s / DEFAULT.compare_every_steps / step_s
    replay_share = DEFAULT.replay_fraction * own_s / step_s
    rows = [
        ("step", step_s, ""),
        (f"comparison of state, every {DEFAULT.compare_every_steps} steps", compare_s, f"{compare_share:.2%}"),
    ]
    for passes, who in ((1, "own rows only"), (2, "and those of one other rank"), (3, "and those of two other ranks")):
        what = f"replay of {DEFAULT.replay_fraction:.2%} of the steps, {who}"
        rows.append((what, passes * own_s, f"{passes * replay_share:.2%}"))
    rows += [
        ("comparison and replays, with one other rank", 0.0, f"{compare_share + 2 * replay_share:.2%}"),
        ("sums of all products, every step", products_s - step_s, f"{products_s / step_s - 1:.1%}"),
        ("sums of collectives, every step", collectives_s - step_s, f"{collectives_s / step_s - 1:.1%}"),
    ]
    sys.stdout.write("| what | ms of processor time | share of the run |\n|---|---|---|\n")
    for what, spent_s, share in rows:
        sys.stdout.write(f"| {what} | {f'{1000 * spent_s:.1f}' if spent_s else ''} | {share} |\n")


if __name__ == "__main__":
    main()
