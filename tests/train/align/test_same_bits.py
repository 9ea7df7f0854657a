"""Sampler and trainer have the same log-probabilities bit by bit, also where logits are large: without that, rounding alone
exceeded GRPO's limit of 1e-5."""

from pathlib import Path

import pytest
import torch
from policy_runs import policy_recipe, policy_stream, prompts_in
from ranks import run_ranks
from tiny import engine_of

from recipes.schema.recipe import Recipe
from train.record.stopwatch import Stopwatch
from train.step import train_step

LARGE = {
    "model.pattern": "M-M*-M-M*-", "model.hidden": 64, "model.ffn": 256, "model.mamba_state": 16,
    "objective.grpo.kl_weight": 0.0, "objective.grpo.prompts_per_step": 6,
    "objective.grpo.generations_per_prompt": 12, "objective.grpo.max_answer_tokens": 24, "data.row_tokens": 128,
}  # fmt: skip


def gap_of(rank: int, recipe: Recipe, factor: float) -> tuple[dict[str, float], float]:
    """(gaps of a batch, mean log p of its tokens), with the weights of every product multiplied by `factor`."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        with torch.no_grad():
            for weight in engine.chunks[0].parameters():
                if weight.dim() == 2:
                    weight.mul_(factor)
        with policy_stream(engine, recipe) as (stream, events):  # the update's own forward pass is compared
            train_step(engine, next(stream), step=0, learning_rate=0.0, watch=Stopwatch())
    (event,) = [event for event in events.found if event["kind"] == "rollouts"]
    return event["log_prob_gap"], -event["entropy"]


@pytest.mark.parametrize("width", [40, 32], ids=["narrow vectors", "wide vectors"])
def test_log_probabilities_are_the_same_numbers(tmp_path: Path, width: int) -> None:
    """With chunked scans and blocked attention in the trainer, the gaps were 2.7e-5 and 1.4e-5, their means 2.2e-6 and 1.9e-6."""
    prompts_in(tmp_path)
    changes = {"model.mamba_head_dim": width, "model.head_dim": width}
    ((gap, log_prob),) = run_ranks(1, gap_of, policy_recipe(tmp_path, **LARGE | changes), 30.0)
    assert gap == {"max": 0.0, "mean": 0.0}
    assert log_prob < -0.1, "a model that is certain of every token shows nothing"
