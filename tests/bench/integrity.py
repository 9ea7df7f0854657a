"""`python -m tests.bench.integrity [--rounds 8]`: what the checks for silent corruption cost, as a Markdown table.

One process of the smoke recipe's size, one thread. A plain step, the comparison of state, and the replay of a step, in turn;
medians. The overhead is that of the default intervals: a comparison every 25 steps and a replay of 0.25 % of the steps. With one
process the replay computes its own rows only; with data-parallel ranks it also computes those of one or two others.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import engine_of

from recipes.schema.integrity import IntegrityConfig
from tests.bench.__main__ import SMOKE, bare_step, batch_of, in_turn, recipe_of
from train.integrity.collectives import CollectiveWatch
from train.integrity.replay import StepReplay
from train.integrity.state import StateWatch


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    config = IntegrityConfig(enabled=True)
    recipe = recipe_of(SMOKE)
    with engine_of(recipe, rank=0, world=1) as engine:
        batch = batch_of(recipe.model.vocab)
        state = StateWatch(engine)
        replay = StepReplay(
            engine,
            collectives=CollectiveWatch(engine.mesh, keeps_records=False),
            rows=lambda _positions: batch,
            compares_ranks=False,
        )

        def compare() -> None:
            state.remember()
            assert not state.check(1)

        def compute_again() -> None:
            replay.before([batch], step=1)

        step_s, compare_s, own_s = in_turn(rounds, lambda: bare_step(engine, batch), compare, compute_again)
    compare_share = compare_s / config.compare_every_steps / step_s
    sys.stdout.write("| what | ms | share of the run |\n|---|---|---|\n")
    sys.stdout.write(f"| step | {1000 * step_s:.0f} | |\n")
    sys.stdout.write(
        f"| comparison of state, every {config.compare_every_steps} steps | {1000 * compare_s:.1f} | {compare_share:.2%} |\n"
    )
    for passes, who in ((1, "own rows only"), (2, "and those of one other rank"), (3, "and those of two other ranks")):
        share = config.replay_fraction * passes * own_s / step_s
        sys.stdout.write(
            f"| replay of {config.replay_fraction:.2%} of the steps, {who} | {1000 * passes * own_s:.0f} | {share:.2%} |\n"
        )
    whole = compare_share + config.replay_fraction * 2 * own_s / step_s
    sys.stdout.write(f"| all, with one other rank | | {whole:.2%} |\n")


if __name__ == "__main__":
    main()
