"""Requests with the same prompt: it is read once, and every text is as if it had been alone, bit by bit."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_speculation import Threes
from tiny import VOCAB, engine_of, recipe_with

from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.engine_stats import EngineStats
from train.inference.request import Event, Request, Sampling

LENGTHS = (1, 16, 37)
"""Of the prompts: a part of a page, a whole page, more than the window."""
WINDOW: dict[str, Any] = {"model.pattern": "Mw*-", "model.window_tokens": 20, "model.init_std": 0.1}
GROUP = 5


def requests() -> list[Request]:
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, VOCAB, (length,), generator=draw).tolist() for length in LENGTHS]
    return [Request(prompt, 9, sampling=Sampling(1.0, seed=seed)) for prompt in prompts for seed in range(GROUP)]


def drawn(events: list[Event]) -> list[tuple[int, float]]:
    return [(event.token.id, event.token.logprob) for event in events if event.token is not None]


def together_and_alone(
    rank: int, changes: dict[str, Any], rows: int, free_pages: int
) -> tuple[list[bool], EngineStats, int]:
    """(whether each text is the same in both ways, counts of the engine with all texts, pages that stay in use)."""
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model = built.chunks[0].module.eval()
        config = EngineConfig(rows=rows, context_tokens=48, page_tokens=4, step_tokens=40, is_stepwise=True)
        engine = InferenceEngine(model, recipe.model, config)
        pages = engine.pools.groups["*"].pages
        while pages.free > free_pages:
            pages.take()
        free_before = pages.free
        found = engine.run(requests())
        alone = [InferenceEngine(model, recipe.model, config).run([request])[0] for request in requests()]
        same = [drawn(a) == drawn(b) for a, b in zip(found, alone, strict=True)]
        return same, engine.stats(), free_before - pages.free


@pytest.mark.parametrize("changes", [{"model.init_std": 0.1}, WINDOW], ids=["hybrid", "window"])
@pytest.mark.parametrize(("rows", "free_pages"), [(16, 999), (4, 999), (8, 20)])
def test_a_prompt_is_read_once_for_all_texts_that_begin_with_it(
    changes: dict[str, Any], rows: int, free_pages: int
) -> None:
    ((same, stats, used),) = run_ranks(1, together_and_alone, changes, rows, free_pages)
    assert all(same) and used == 0
    read, once = stats.prompt_tokens - stats.cached_tokens, sum(LENGTHS)
    if rows == 16:
        assert read == once and stats.prompt_tokens == GROUP * once
    else:  # texts that found no row or no page read the prompt again
        assert stats.preemptions or read < 0.6 * GROUP * once
    assert bool(stats.preemptions) == (free_pages < 999)


def after_a_guess(rank: int) -> list[bool]:
    """Whether texts without guesses, whose prompt a text with wrong guesses reads, are as if they had been alone."""
    recipe = recipe_with(**{"model.init_std": 0.1})
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model = built.chunks[0].module.eval()
        config = EngineConfig(rows=3, context_tokens=48, page_tokens=4)
        plain = [Request([5], 9, sampling=Sampling(1.0, seed=seed), draft_tokens=0) for seed in (1, 2)]
        guessing = Request([5], 9, sampling=Sampling(1.0, seed=0))
        found = InferenceEngine(model, recipe.model, config, drafter=Threes()).run([guessing, *plain])[1:]
        alone = [InferenceEngine(model, recipe.model, config).run([request])[0] for request in plain]
        return [drawn(a) == drawn(b) for a, b in zip(found, alone, strict=True)]


def test_a_text_does_not_begin_with_the_guesses_of_another() -> None:
    assert run_ranks(1, after_a_guess) == [[True, True]]
