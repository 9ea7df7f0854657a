"""Sampling follows its definitions, and a text's draws depend on its own seed only."""

import torch

from train.inference.request import Sampling
from train.inference.sampling import Draw, draw


def shares(sampling: Sampling, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    drawn = draw(logits.expand(draws, -1), [Draw(sampling, number) for number in range(draws)])
    return torch.bincount(drawn, minlength=logits.shape[-1]) / draws


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    torch.testing.assert_close(shares(Sampling(temperature=1.0), logits), logits.exp(), rtol=0, atol=0.03)
    cold = torch.softmax(logits / 0.5, dim=-1)
    torch.testing.assert_close(shares(Sampling(temperature=0.5), logits), cold, rtol=0, atol=0.03)
    cut = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    torch.testing.assert_close(shares(Sampling(temperature=1.0, top_k=3), logits), cut, rtol=0, atol=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.log(torch.tensor([0.15, 0.5, 0.05, 0.3]))
    assert (shares(Sampling(temperature=1.0, top_k=2), logits) > 0).tolist() == [False, True, False, True]
    assert (shares(Sampling(temperature=1.0, top_p=0.7), logits) > 0).tolist() == [False, True, False, True]
    assert (shares(Sampling(temperature=1.0, top_p=0.4), logits) > 0).tolist() == [False, True, False, False]
    assert (shares(Sampling(temperature=1.0, top_k=9, top_p=0.0), logits) > 0).tolist() == [False, True, False, False]


def test_a_line_is_drawn_the_same_next_to_any_others() -> None:
    kinds = [Sampling(0.0), Sampling(0.7, seed=1), Sampling(1.3, top_k=5, seed=2), Sampling(1.0, top_p=0.8, seed=3)]
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(kinds[line % 4], line) for line in range(16)]
    alone = [int(draw(logits[line : line + 1], draws[line : line + 1])) for line in range(16)]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    assert draw(logits[order], [draws[line] for line in order]).tolist() == [alone[line] for line in order]


def test_rounding_does_not_swap_tokens_that_are_equally_likely() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).double()
    logits[0, [7, 30]] = 1.0
    other = logits.clone()
    other[0, 30] += 1e-7
    draws = [Draw(Sampling(1.0, top_k=40, top_p=0.95), number) for number in range(2000)]
    found, again = (draw(one.expand(2000, -1), draws) for one in (logits, other))
    assert torch.equal(found, again) and {7, 30} <= set(found.tolist())


def test_seeds_and_numbers_give_different_draws() -> None:
    flat = torch.zeros(1, 1000)
    tokens = [int(draw(flat, [Draw(Sampling(1.0, seed=seed), number)])) for seed in (0, 1) for number in range(20)]
    assert len(set(tokens)) > 35
