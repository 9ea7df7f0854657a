"""Tokens that are taken back leave no trace: states, pages and later outputs are those of a text that never had them."""

import random
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import GEMMA, VOCAB, engine_of, recipe_with

from launch.plan.cost.inference import cache_sizes
from recipes.schema.model import ModelConfig
from train.inference.forward import Read, read_tokens, settle
from train.inference.pools import Pools
from train.model.few_tokens import FewTokens

FAMILIES: dict[str, dict[str, Any]] = {
    "hybrid": {"model.init_std": 0.1}, "gemma": GEMMA, "mamba": {"model.pattern": "M-M-", "model.init_std": 0.1}
}  # fmt: skip
ROWS, CONTEXT = 3, 60


def pools_of(shape: ModelConfig) -> Pools:
    sizes = cache_sizes(
        shape, rows=ROWS, context_tokens=CONTEXT, page_tokens=4, step_tokens=24, number_bytes=4, trial_tokens=ROWS * 8
    )
    return Pools(shape, sizes, dtype=torch.float32, device=torch.device("cpu"))


def read(model: Any, reads: list[Read], pools: Pools, few: FewTokens | None) -> torch.Tensor:
    for one in reads:
        pools.extend(one.row, one.before + len(one.tokens))
    return read_tokens(model, reads, pools, few=few)


def guesses(rank: int, changes: dict[str, Any], is_prepared: bool, is_settled: bool) -> dict[str, float]:
    """Texts of which some tokens are guesses, against the same texts read without any, token by token. -> differences"""
    recipe, draw = recipe_with(**changes), random.Random(5)
    worst = {"states": 0.0, "hidden": 0.0, "pages": 0.0}
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model = built.chunks[0].module.eval()
        few = FewTokens(model) if is_prepared else None
        pools, plain = pools_of(recipe.model), pools_of(recipe.model)
        done = [0] * ROWS
        for _ in range(8):
            true = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 6))] for _ in range(ROWS)]
            wrong = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 7 - len(part)))] for part in true]
            reads = [Read(r, true[r] + wrong[r], done[r], is_trial=True) for r in range(ROWS)]
            hidden = read(model, reads, pools, few).split([len(one.tokens) for one in reads])
            if is_settled:
                settle(model, reads, list(map(len, true)), pools)
            for row, part in enumerate(true):
                for index, token in enumerate(part):
                    (alone,) = read(model, [Read(row, [token], done[row] + index)], plain, few)
                    worst["hidden"] = max(worst["hidden"], float((hidden[row][index] - alone).abs().max()))
                done[row] += len(part)
                for both in (pools, plain):
                    both.cut(row, done[row])
                    both.slide(row, done[row])
            for number, pool in pools.states.items():
                for a, b in ((pool.conv, plain.states[number].conv), (pool.scan, plain.states[number].scan)):
                    worst["states"] = max(worst["states"], float((a - b).abs().max()))
            for kind, group in pools.groups.items():
                worst["pages"] += abs(group.pages.free - plain.groups[kind].pages.free)
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_states_after_rejected_guesses_are_equal_to_the_bit(family: str) -> None:
    found = run_ranks(1, guesses, FAMILIES[family], True, True)[0]
    assert found == {"states": 0.0, "hidden": 0.0, "pages": 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_after_rejected_guesses_are_equal_in_the_layers_of_training(family: str) -> None:
    found = run_ranks(1, guesses, FAMILIES[family], False, True)[0]
    assert found["states"] < 1e-5 and found["hidden"] < 1e-5 and found["pages"] == 0


def test_without_rollback_this_test_fails() -> None:
    found = run_ranks(1, guesses, FAMILIES["hybrid"], True, False)[0]
    assert found["states"] > 1e-2 and found["hidden"] > 1e-2
