"""Decoding on tensor ranks, from a checkpoint of another layout, equals one process, with and without speculation; all ranks
get the same events."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, recipe_of, trained
from ranks import run_ranks
from tiny import VOCAB, engine_of, recipe_with

from recipes.schema.recipe import Recipe
from train.build import models_for_inference
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.draft_model import DraftModel
from train.inference.drafters import Drafter, PromptLookup
from train.inference.forward import logits_in_parts
from train.inference.request import Event, Request, Sampling, Token
from train.model.attention import zigzag_positions


def continued(rank: int, recipe: Recipe, checkpoint: Path, tensor: int) -> list[list[list[Event]]]:
    """The same requests without speculation, with look-up and with a draft model that is right in most cases."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (length,), generator=draw).tolist() for length in (3, 30, 1, 17)]
    samplings = [Sampling(0.0), Sampling(0.0), Sampling(1.0, seed=4), Sampling(0.8, top_p=0.9, seed=5)]
    requests = [Request(p, 10, sampling=s, score_from=1) for p, s in zip(prompts, samplings, strict=True)]
    config = EngineConfig(rows=2, context_tokens=48, step_tokens=16, page_tokens=4, prefix_blocks=4, block_tokens=8)
    found, sources, device = [], [(recipe, checkpoint)] * 2, torch.device("cpu")
    with models_for_inference(sources, device=device, rank=rank, tensor=tensor) as (model, other), torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.02)
        drafters: list[Drafter | None] = [None, PromptLookup(shortest=1), DraftModel(other, recipe.model)]
        for drafter in drafters:
            engine = InferenceEngine(model, recipe.model, config, drafter=drafter)
            found.append(engine.run(requests))
            assert (drafter is None) == (engine.stats().guessed_tokens == 0)
        assert engine.stats().accepted_tokens
    return found


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("nemotron_h", 4),
        ("gemma2", 2),
        pytest.param("nemotron_h", 2, marks=pytest.mark.slow),
        pytest.param("gemma2", 4, marks=pytest.mark.slow),
    ],
)
def test_tensor_ranks_equal_one_process(family: str, tensor: int, tmp_path: Path) -> None:
    model = replace(FAMILIES[family], heads=4, kv_heads=4, mamba_groups=4, init_std=0.1)
    recipe = recipe_of(model, pipeline=2)
    checkpoint = trained(tmp_path / "run", recipe, world=2)  # two stages
    (alone,) = run_ranks(1, continued, recipe, checkpoint, 1)
    first, *others = run_ranks(tensor, continued, recipe, checkpoint, tensor)
    assert all(other == first for other in others)
    for here, there in zip(itertools.chain(*alone), itertools.chain(*first), strict=True):
        pairs = list(zip(_scored(here), _scored(there), strict=True))
        assert [a.id for a, _ in pairs] == [b.id for _, b in pairs]
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-5


def _scored(events: list[Event]) -> list[Token]:
    return [token for event in events for token in (*event.scores, event.token) if token is not None]


def log_probabilities(rank: int, context: int, tokens: int) -> dict[int, list[float]]:
    """By position, at 65 places of a text: of the trainer's forward pass over `context` ranks, or (0) of the engine in parts."""
    changes = {"model.pattern": "M*-M", "model.init_std": 0.1, "data.row_tokens": tokens}
    recipe = recipe_with(**changes, **({"parallel.context": context} if context else {}))
    text = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(0, tokens, tokens // 64), torch.tensor([tokens - 1])])
    with engine_of(recipe, rank=rank, world=max(1, context)) as built, torch.no_grad():
        model = built.chunks[0].module.eval()
        if not context:
            cuts = [min(512, tokens - start) for start in range(0, tokens, 512)]
            logits = logits_in_parts(model, text.tolist(), cuts, shape=recipe.model, page_tokens=64)[places]
        else:
            own = zigzag_positions(tokens, rank=rank, ranks=context, device=torch.device("cpu"))
            hidden = model.decoder(
                hidden_states=model.embedding(text[own][None], own[None]), attention_mask=None, inference_context=None
            )
            places = own[torch.isin(own, places)]
            logits = model.output_layer(hidden[torch.isin(own, places)])[0][:, 0]
        return dict(zip(places.tolist(), torch.log_softmax(logits, -1).tolist(), strict=True))


@pytest.mark.parametrize("tokens", [1024, pytest.param(131_072, marks=pytest.mark.slow)])
def test_the_engine_agrees_with_the_trainer_over_two_context_ranks(tokens: int) -> None:
    (engine,) = run_ranks(1, log_probabilities, 0, tokens, timeout_s=900)
    first, second = run_ranks(2, log_probabilities, 2, tokens, timeout_s=900)
    trainer = first | second
    assert sorted(trainer) == sorted(engine) and len(engine) == 65
    worst = max(abs(a - b) for place in engine for a, b in zip(engine[place], trainer[place], strict=True))
    assert worst < 1e-5
