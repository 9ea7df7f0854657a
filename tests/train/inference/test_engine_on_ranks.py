"""Decoding on two tensor ranks, from a checkpoint of another layout, equals one process; both ranks get the same events."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, recipe_of, trained
from ranks import run_ranks

from recipes.schema.recipe import Recipe
from train.build import model_for_inference
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Event, Request, Sampling


def continued(rank: int, recipe: Recipe, checkpoint: Path, tensor: int) -> list[list[Event]]:
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (length,), generator=draw).tolist() for length in (3, 30, 1, 17)]
    samplings = [Sampling(0.0), Sampling(0.0), Sampling(1.0, seed=4), Sampling(0.8, top_p=0.9, seed=5)]
    requests = [Request(p, 10, sampling=s, score_from=1) for p, s in zip(prompts, samplings, strict=True)]
    device = torch.device("cpu")
    with model_for_inference(recipe, checkpoint, device=device, rank=rank, tensor=tensor) as model:
        config = EngineConfig(rows=2, context_tokens=48, step_tokens=16, page_tokens=4, prefix_blocks=4, block_tokens=8)
        engine = InferenceEngine(model, recipe.model, config)
        return engine.run(requests)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tensor_ranks_equal_one_process(family: str, tmp_path: Path) -> None:
    recipe = recipe_of(replace(FAMILIES[family], heads=4, kv_heads=2, init_std=0.1), pipeline=2)
    checkpoint = trained(tmp_path / "run", recipe, world=2)  # two stages
    (alone,) = run_ranks(1, continued, recipe, checkpoint, 1)
    first, second = run_ranks(2, continued, recipe, checkpoint, 2)
    assert first == second
    for here, there in zip(alone, first, strict=True):
        pairs = [
            pair
            for a, b in zip(here, there, strict=True)
            for pair in zip((*a.scores, a.token), (*b.scores, b.token), strict=True)
        ]
        assert [a and a.id for a, _ in pairs] == [b and b.id for _, b in pairs]
        assert max(abs(a.logprob - b.logprob) for a, b in pairs if a and b) < 1e-5
