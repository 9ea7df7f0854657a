"""The inference engine: every text of a ragged batch equals the same text alone and the training forward pass, for any
order of arrival, any sizes of pages, steps and pools, and any texts that are cancelled or have to wait.

The expected numbers come from the training forward pass of whole texts.
"""

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import GEMMA, VOCAB, engine_of, recipe_with

from recipes.schema.errors import RecipeError
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Event, Request, Sampling, Token

GREEDY = Sampling(temperature=0.0)
FAMILIES: dict[str, dict[str, Any]] = {"hybrid": {"model.init_std": 0.1}, "gemma": GEMMA}


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token.id for event in events if event.token is not None]


def scored(events: list[Event]) -> list[Token]:
    """All tokens with log-probabilities, of the prompt and generated."""
    return [token for event in events for token in (*event.scores, *[event.token] * (event.token is not None))]  # type: ignore[misc]


class Truth:
    """The training forward pass of whole texts, one at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logprobs(self, text: list[int]) -> torch.Tensor:
        """[tokens, vocabulary]"""
        tokens = torch.tensor([text])
        logits = self.model(tokens, torch.arange(len(text))[None], None)
        return torch.log_softmax(logits[0].float(), -1)

    def error(self, request: Request, events: list[Event]) -> tuple[float, float]:
        """(largest, mean) difference of log-probabilities; inf if a greedy token is not the likeliest or a score is missing."""
        text = [*request.prompt, *tokens_of(events)]
        expected = self.logprobs(text)[:-1].gather(1, torch.tensor(text)[1:, None])[:, 0]
        found = scored(events)
        if [token.id for token in found] != text[request.score_from or len(request.prompt) :]:
            return float("inf"), float("inf")
        if request.sampling.temperature == 0 and not all(event.token.is_likeliest for event in events if event.token):
            return float("inf"), float("inf")
        error = (torch.tensor([token.logprob for token in found]) - expected[len(expected) - len(found) :]).abs()
        return float(error.max()), float(error.mean())


def requests_of(draw: random.Random, count: int) -> list[Request]:
    shared = [draw.randrange(VOCAB) for _ in range(24)]
    requests = []
    for _ in range(count):
        own = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 30))]
        prompt = shared[: draw.choice([0, 8, 16, 24])] + own
        sampling = draw.choice(
            [GREEDY, Sampling(0.9, seed=draw.randrange(99)), Sampling(1.0, top_k=20, top_p=0.9, seed=1)]
        )
        requests.append(
            Request(
                prompt, draw.randint(0, 12), sampling=sampling, priority=draw.choice([0, 0, 1]),
                score_from=draw.choice([None, None, 1, max(1, len(prompt) // 2)]),
            )
        )  # fmt: skip
    return requests


def pages_in_use(engine: InferenceEngine) -> int:
    return sum(group.pages.count - group.pages.free for group in engine.pools.groups.values())


def drive(
    engine: InferenceEngine, requests: list[Request], draw: random.Random, *, cancelled: float = 0.04
) -> dict[int, list[Event]]:
    """Requests arrive at random moments. cancelled: probability of a cancel at each step. -> events by index of the request."""
    ids: dict[int, int] = {}
    events: dict[int, list[Event]] = {}
    left = list(range(len(requests)))
    while left or not engine.is_idle:
        for _ in range(draw.randint(0, 3)):
            if left:
                index = left.pop(0)
                ids[engine.add(requests[index])] = index
        if ids and draw.random() < cancelled:
            engine.cancel(draw.choice(list(ids)))
        for event in engine.step():
            events.setdefault(ids[event.request], []).append(event)
    return events


def random_batches(rank: int, changes: dict[str, Any], seeds: range) -> dict[str, float]:
    worst, means, seen = 0.0, [], {"preemptions": 0, "cached_tokens": 0, "cancelled": 0, "leaked": 0, "unlike alone": 0}
    for seed in seeds:
        draw = random.Random(seed)
        recipe = recipe_with(**changes)
        with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
            truth = Truth(built.chunks[0].module.eval())
            for _ in range(3):
                page = draw.choice([1, 2, 4, 8])
                config = EngineConfig(
                    rows=draw.randint(1, 5), context_tokens=66, page_tokens=page, step_tokens=draw.choice([5, 8, 17, 64]),
                    prefix_blocks=draw.choice([0, 3, 8]), block_tokens=8,
                )  # fmt: skip
                engine = InferenceEngine(truth.model, recipe.model, config)
                least = engine.pools.bytes().total - engine.pools.bytes().keys_values * 0.6
                if draw.random() < 0.7 and "*" in recipe.model.pattern:
                    with suppress(RecipeError):
                        engine = InferenceEngine(truth.model, recipe.model, replace(config, memory_bytes=int(least)))
                requests = requests_of(draw, 7)
                results = drive(engine, requests, draw)
                for index, events in results.items():
                    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
                    if events[-1].finish == "cancelled":
                        seen["cancelled"] += 1
                        continue
                    assert events[-1].finish == "length"
                    assert len(tokens_of(events)) == requests[index].max_new_tokens
                    if scored(events):
                        largest, mean = truth.error(requests[index], events)
                        worst = max(worst, largest)
                        means.append(mean)
                    alone = InferenceEngine(truth.model, recipe.model, EngineConfig(rows=1, context_tokens=66))
                    seen["unlike alone"] += tokens_of(alone.run([requests[index]])[0]) != tokens_of(events)
                stats = engine.stats()
                seen["preemptions"] += stats.preemptions
                seen["cached_tokens"] += stats.cached_tokens
                engine.prefixes.clear()
                seen["leaked"] += pages_in_use(engine) + (len(engine._free_rows) != config.rows)
    return {"worst": worst, "mean": sum(means) / len(means), **seen}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_many_random_batches_equal_texts_alone_and_the_training_forward(family: str) -> None:
    found = run_ranks(1, random_batches, FAMILIES[family], range(10, 40), timeout_s=600)[0]
    assert found["worst"] < 1e-5 and found["mean"] < 1e-6
    assert found["unlike alone"] == 0 and found["leaked"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_random_batches_equal_texts_alone_and_the_training_forward(family: str) -> None:
    found = run_ranks(1, random_batches, FAMILIES[family], range(2, 3))[0]
    assert found["worst"] < 1e-5 and found["mean"] < 1e-6
    assert found["unlike alone"] == 0 and found["leaked"] == 0
    assert found["preemptions"] and found["cached_tokens"] and found["cancelled"], "the case is to contain all of these"
