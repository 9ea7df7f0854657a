"""Generation: cached steps give the logits of the full forward pass, and sampling follows its definitions."""

import pytest
import torch
from ranks import run_ranks
from tiny import VOCAB, engine_of, recipe_with

from train.inference.decode import Sampling, forward_cached, generate, pick
from train.model.context import LayerCaches


def cached_against_full(rank: int, changes: dict[str, object]) -> float:
    """Largest difference between logits cached in uneven parts and those of one pass, relative to their spread."""
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=1) as engine, torch.no_grad():
        model = engine.chunks[0].module.eval()
        tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
        positions = torch.arange(40).expand_as(tokens)
        full = model(tokens, positions, None)
        caches, worst = LayerCaches(), 0.0
        start = 0
        for length in (17, 1, 1, 1, 5, 1, 14):
            logits = forward_cached(model, tokens[:, start : start + length], caches)
            start += length
            worst = max(worst, float((logits - full[:, start - 1]).abs().max()))
        return worst / float(full.std())


GEMMA = {
    "model.pattern": "w-*-M", "model.position": "rope", "model.window_tokens": 6, "model.attention_softcap": 5.0,
    "model.logit_softcap": 3.0, "model.norm_offset": 1, "model.post_norms": True, "model.scale_embedding": True,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"model.position": "rope"}, GEMMA], ids=["hybrid", "rotary", "gemma"])
def test_cached_logits_equal_the_full_pass(changes: dict[str, object]) -> None:
    assert run_ranks(1, cached_against_full, changes)[0] < 1e-5


def greedy_twice(rank: int) -> tuple[list[int], list[int], int]:
    with engine_of(recipe_with(), rank=rank, world=1) as engine:
        model = engine.chunks[0].module
        draw = [
            list(generate(model, [1, 2, 3], tokens=8, sampling=Sampling(temperature=t, seed=5))) for t in (0.0, 1.0)
        ]
        stopped = list(
            generate(model, [1, 2, 3], tokens=8, sampling=Sampling(temperature=0.0), end_of_document=draw[0][0])
        )
        return draw[0], list(generate(model, [1, 2, 3], tokens=8, sampling=Sampling(temperature=0.0))), len(stopped)


def test_greedy_repeats_and_stops_at_the_end_of_the_document() -> None:
    first, second, stopped = run_ranks(1, greedy_twice)[0]
    assert first == second and len(first) == 8 and stopped == 1


def shares(sampling: Sampling, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    picked = pick(logits.expand(draws, -1), sampling, generator)
    return torch.bincount(picked, minlength=logits.shape[-1]) / draws


def test_picks_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    torch.testing.assert_close(shares(Sampling(temperature=1.0), logits), logits.exp(), rtol=0, atol=0.03)
    cold = torch.softmax(logits / 0.5, dim=-1)
    torch.testing.assert_close(shares(Sampling(temperature=0.5), logits), cold, rtol=0, atol=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.log(torch.tensor([0.15, 0.5, 0.05, 0.3]))
    assert (shares(Sampling(temperature=1.0, top_k=2), logits) > 0).tolist() == [False, True, False, True]
    assert (shares(Sampling(temperature=1.0, top_p=0.7), logits) > 0).tolist() == [False, True, False, True]
    assert (shares(Sampling(temperature=1.0, top_p=0.4), logits) > 0).tolist() == [False, True, False, False]
