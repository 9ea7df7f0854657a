"""Decoding on tensor ranks, from a checkpoint of another layout, equals one process, with and without speculation; all ranks
get the same events."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, recipe_of, trained
from ranks import run_ranks

from recipes.schema.recipe import Recipe
from train.build import models_for_inference
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.draft_model import DraftModel
from train.inference.drafters import PromptLookup
from train.inference.request import Event, Request, Sampling, Token


def continued(
    rank: int, recipe: Recipe, checkpoint: Path, tensor: int, drafter: str | None = None
) -> list[list[Event]]:
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (length,), generator=draw).tolist() for length in (3, 30, 1, 17)]
    samplings = [Sampling(0.0), Sampling(0.0), Sampling(1.0, seed=4), Sampling(0.8, top_p=0.9, seed=5)]
    requests = [Request(p, 10, sampling=s, score_from=1) for p, s in zip(prompts, samplings, strict=True)]
    device = torch.device("cpu")
    with models_for_inference([(recipe, checkpoint)] * 2, device=device, rank=rank, tensor=tensor) as (model, other):
        if drafter == "noisy":
            for weight in other.parameters():  # the same on every rank up to the split: no random numbers
                weight.mul_(1.02)
        guess = {None: None, "lookup": PromptLookup(shortest=1), "noisy": DraftModel(other, recipe.model)}[drafter]
        config = EngineConfig(rows=2, context_tokens=48, step_tokens=16, page_tokens=4, prefix_blocks=4, block_tokens=8)
        engine = InferenceEngine(model, recipe.model, config, drafter=guess)
        events = engine.run(requests)
        assert drafter is None or engine.stats().accepted_tokens
        return events


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_ranks_equal_one_process(family: str, tmp_path: Path) -> None:
    model = replace(FAMILIES[family], heads=4, kv_heads=4, mamba_groups=4, init_std=0.1)
    recipe = recipe_of(model, pipeline=2)
    checkpoint = trained(tmp_path / "run", recipe, world=2)  # two stages
    for drafter in (None, "lookup", "noisy"):
        (alone,) = run_ranks(1, continued, recipe, checkpoint, 1, drafter)
        for tensor in (2, 4) if drafter is None else (2,):
            ranks = run_ranks(tensor, continued, recipe, checkpoint, tensor, drafter)
            assert all(events == ranks[0] for events in ranks)
            for here, there in zip(alone, ranks[0], strict=True):
                pairs = list(zip(_scored(here), _scored(there), strict=True))
                assert [a.id for a, _ in pairs] == [b.id for _, b in pairs]
                assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-5


def _scored(events: list[Event]) -> list[Token]:
    return [token for event in events for token in (*event.scores, event.token) if token is not None]
