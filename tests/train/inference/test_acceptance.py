"""The rule of acceptance keeps the model's own distribution: enumerated exactly, and counted over many draws."""

import pytest
import torch
from chi_square import surprise

from train.inference.acceptance import Guess, acceptance, next_tokens, remainder
from train.inference.request import Sampling
from train.inference.sampling import Draw, distribution, draw, draw_from, uniforms


def distributions(count: int, vocab: int, *, seed: int) -> torch.Tensor:
    """Random ones in float64, some with zeros and some almost certain of a token."""
    draw = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(count, vocab, generator=draw, dtype=torch.float64)
        * torch.tensor([1.0, 4.0, 9.0]).repeat(count)[:count, None]
    )
    weights = torch.softmax(logits, -1) * (torch.rand(count, vocab, generator=draw) < 0.7)
    weights[:, 0] += weights.sum(-1) == 0
    return weights / weights.sum(-1, keepdim=True)


def test_the_rule_gives_the_models_distribution_exactly() -> None:
    """P(token) summed over all guesses: q(d) (a(d) [token = d] + (1 - a(d)) remainder(token)), in float64."""
    count, vocab = 300, 7
    p, q = distributions(count, vocab, seed=0), distributions(count, vocab, seed=1)
    q[-3:], p[-1], q[-1] = p[-3:], torch.eye(vocab, dtype=torch.float64)[2], torch.eye(vocab, dtype=torch.float64)[5]
    rest = remainder(p, q)
    rest = rest / rest.sum(-1, keepdim=True)
    found = torch.zeros_like(p)
    for id in range(vocab):
        guessed = q[:, id] > 0
        accepted = torch.zeros(count, dtype=torch.float64)
        accepted[guessed] = acceptance(p[guessed], q[guessed], torch.full((int(guessed.sum()),), id))
        found[:, id] += q[:, id] * accepted
        found += (q[:, id] * (1 - accepted))[:, None] * rest
    torch.testing.assert_close(found, p, rtol=0, atol=1e-15)
    assert (p[-1] > 0).sum() == 1 and not acceptance(p[-1:], q[-1:], torch.tensor([5])).any()


SAMPLINGS = [
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.4, top_k=4),
    Sampling(1.0, top_p=0.8),
    Sampling(0.9, top_k=5, top_p=0.9),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("is_certain", [False, True], ids=["draft model", "look-up"])
def test_tokens_of_many_draws_follow_the_models_distribution(sampling: Sampling, is_certain: bool) -> None:
    draws = [Draw(sampling, number) for number in range(8_000)]
    given = torch.Generator().manual_seed(3)
    model, draft = (1.5 * torch.randn(1, 6, generator=given, dtype=torch.float64) for _ in range(2))
    p, q = distribution(model, draws[:1])[0], distribution(draft, draws[:1])[0]
    guessed = draw_from(q.expand(len(draws), -1), uniforms(draws, q.device, " guess"))
    guesses = [None if is_certain else Guess(int(id), q) for id in guessed]
    found = next_tokens(model.expand(len(draws), -1), draws, guesses)
    assert surprise(torch.bincount(found, minlength=6).double(), p * len(draws)) > 1e-3
    assert surprise(torch.bincount(guessed, minlength=6).double(), q * len(draws)) > 1e-3
    accepted = float((found == guessed).double().mean())
    if (
        not is_certain
    ):  # the rule accepts as often as any rule can: the overlap of p and q, and what the rest gives by chance
        assert accepted >= float(torch.minimum(p, q).sum()) - 0.015


def test_a_rule_that_accepts_too_often_is_noticed() -> None:
    """What the counts above would be if every guess were accepted, or if a rejected one were drawn from p."""
    draws = [Draw(Sampling(1.0), number) for number in range(8_000)]
    given = torch.Generator().manual_seed(3)
    p, q = (torch.softmax(1.5 * torch.randn(1, 6, generator=given, dtype=torch.float64), -1) for _ in range(2))
    all_p, all_q = p.expand(len(draws), -1), q.expand(len(draws), -1)
    guessed = draw_from(all_q, uniforms(draws, q.device, " guess"))
    is_accepted = uniforms(draws, q.device, " accept")[:, 0] < acceptance(all_p, all_q, guessed)
    mixed = torch.where(is_accepted, guessed, draw_from(all_p, uniforms(draws, q.device, " remainder")))
    for wrong in (guessed, mixed):
        assert surprise(torch.bincount(wrong, minlength=6).double(), p[0] * len(draws)) < 1e-9


def test_a_guess_without_a_distribution_changes_nothing() -> None:
    logits = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    draws = [Draw(Sampling(0.0 if line % 3 == 0 else 0.9, top_k=line % 2 * 4, seed=line), line) for line in range(12)]
    assert torch.equal(next_tokens(logits, draws, [None] * 12), draw(logits, draws))
    greedy = [Draw(Sampling(0.0), line) for line in range(12)]
    wrong = [Guess(0, torch.eye(9, dtype=torch.float64)[0])] * 12
    assert torch.equal(next_tokens(logits, greedy, wrong), logits.argmax(-1))


def test_a_line_is_drawn_the_same_next_to_any_others() -> None:
    logits = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    kinds = [Sampling(0.0), Sampling(0.7, seed=1), Sampling(1.3, top_k=5, seed=2), Sampling(1.0, top_p=0.8, seed=3)]
    draws = [Draw(kinds[line % 4], line) for line in range(16)]
    q = torch.softmax(torch.randn(16, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1)
    guesses = [Guess(line, q[line]) if line % 3 else None for line in range(16)]
    alone = [int(next_tokens(logits[i : i + 1], draws[i : i + 1], guesses[i : i + 1])) for i in range(16)]
    assert next_tokens(logits, draws, guesses).tolist() == alone
