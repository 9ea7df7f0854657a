"""The inference engine: every text of a ragged batch equals the same text alone and the training forward pass."""

import pytest
import torch
from ranks import run_ranks
from tiny import GEMMA, VOCAB, engine_of, recipe_with

from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Event, Request, Sampling

GREEDY = Sampling(temperature=0.0)


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token.id for event in events if event.token is not None]


def prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 41, (count,), generator=draw).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=draw).tolist() for length in lengths]


def batch_against_alone(rank: int, changes: dict[str, object]) -> tuple[int, float]:
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=1) as engine, torch.no_grad():
        model = engine.chunks[0].module
        requests = [Request(prompt, 12, sampling=GREEDY, score_from=1) for prompt in prompts(6)]
        config = EngineConfig(rows=4, context_tokens=64, page_tokens=4, step_tokens=24)
        together = InferenceEngine(model, recipe.model, config).run(requests)
        different, worst = 0, 0.0
        for request, events in zip(requests, together, strict=True):
            alone = InferenceEngine(model, recipe.model, config).run([request])[0]
            different += tokens_of(events) != tokens_of(alone)
            text = torch.tensor([[*request.prompt, *tokens_of(events)]])
            full = torch.log_softmax(model(text, torch.arange(text.shape[1])[None], None)[0].float(), -1)
            scored = [
                token for event in events for token in (*event.scores, *[event.token] * (event.token is not None))
            ]
            assert [token.id for token in scored] == text[0, 1:].tolist()
            found = torch.tensor([token.logprob for token in scored])
            worst = max(worst, float((found - full[:-1].gather(1, text[0, 1:, None])[:, 0]).abs().max()))
        return different, worst


@pytest.mark.parametrize("changes", [{}, GEMMA], ids=["hybrid", "gemma"])
def test_texts_of_a_batch_equal_texts_alone_and_the_training_forward(changes: dict[str, object]) -> None:
    different, worst = run_ranks(1, batch_against_alone, changes)[0]
    assert different == 0
    assert worst < 1e-5
