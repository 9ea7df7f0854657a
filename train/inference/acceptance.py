"""Decides which guesses of a drafter become tokens, without changing the distribution of tokens (arXiv 2211.17192, 2302.01318).

    guess d ~ q        accepted with probability min(1, p(d) / q(d)); otherwise a token is drawn from max(0, p - q), normalised
    d without a q      the token is drawn from p as without a guess; the guess is accepted if it equals the token

The second rule is the first one for a q that gives d probability 1: the token is d with probability p(d), and otherwise follows p
without d. It gives the same tokens as without speculation. Greedy decoding does so too, with either kind of drafter.

p and q are the distributions after temperature, top_k and top_p, in float64. All random numbers are functions of the
request's seed and the token's number. So a text depends on its request and the two models, but not on the number of
guesses, the batch, or waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train.inference.sampling import Draw, distribution, draw, draw_from, uniforms


@dataclass(frozen=True)
class Guess:
    """A token that was drawn from a distribution."""

    id: int
    distribution_V: torch.Tensor
    """float64; ids beyond its length have probability 0."""


def acceptance(p_NV: torch.Tensor, q_NV: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """Probability with which each guess is accepted, [N]; q of a guess is above 0."""
    p, q = (x.gather(-1, ids_N[:, None])[:, 0] for x in (p_NV, q_NV))
    return (p / q).clamp(max=1)


def remainder(p_NV: torch.Tensor, q_NV: torch.Tensor) -> torch.Tensor:
    """Weights from which a token is drawn instead of a rejected guess, [N, V]."""
    rest = (p_NV - q_NV).clamp(min=0)
    # If max(0, p - q) is zero, p and q are equal up to rounding, so p itself is the right distribution.
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_NV)


def next_tokens(
    logits_NV: torch.Tensor,
    draws: Sequence[Draw],
    guesses: Sequence[Guess | None],
    likeliest_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The token after each line of logits, [N]. guesses: one for each line; None: draw as without speculation. likeliest_N: the
    argmax of each line, if it is known."""
    lines = [line for line, guess in enumerate(guesses) if guess is not None and draws[line].sampling.temperature > 0]
    if not lines:
        return draw(logits_NV, draws, likeliest_N)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits_NV.device)
    guessed = set(lines)
    others = [line for line in range(len(draws)) if line not in guessed]
    if others:
        tokens[others] = draw(logits_NV[others], [draws[line] for line in others])
    some, found = [draws[line] for line in lines], [guess for line in lines if (guess := guesses[line]) is not None]
    ids = torch.tensor([guess.id for guess in found], device=logits_NV.device)
    q = torch.stack([guess.distribution_V for guess in found])
    p = distribution(logits_NV[lines], some)[:, : q.shape[-1]]
    is_accepted = uniforms(some, p.device, " accept")[:, 0] < acceptance(p, q, ids)
    tokens[lines] = torch.where(is_accepted, ids, draw_from(remainder(p, q), uniforms(some, p.device, " remainder")))
    return tokens
