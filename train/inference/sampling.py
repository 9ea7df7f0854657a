"""Draws the next tokens of a batch from logits: each text with its own options and random numbers.

A text's random number for its n-th token is a hash of its seed and n. So a text gets the same tokens in any batch, after it had
to wait, and on every tensor rank, and no state of a generator has to be stored.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train.inference.request import Sampling


@dataclass(frozen=True)
class Draw:
    """The options for one line of logits."""

    sampling: Sampling
    number: int
    """Number of tokens that the text has generated so far."""


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of the two integers (BLAKE2b, RFC 7693)."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def draw(logits_NV: torch.Tensor, draws: Sequence[Draw], best_N: torch.Tensor) -> torch.Tensor:
    """One token for each line of logits, [N]. A line's token depends on that line only. best: their likeliest tokens."""
    tokens = best_N.clone()
    warm = [line for line, one in enumerate(draws) if one.sampling.temperature > 0]
    for is_cut in (False, True):
        lines = [line for line in warm if _is_cut(draws[line].sampling) == is_cut]
        if lines:
            some = logits_NV if len(lines) == len(draws) else logits_NV[lines]
            tokens[lines] = _drawn(some, [draws[line] for line in lines], is_cut=is_cut)
    return tokens


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _drawn(logits_NV: torch.Tensor, draws: Sequence[Draw], *, is_cut: bool) -> torch.Tensor:
    """The token at each line's random number in the cumulative distribution; sorted lines are cut to the likeliest tokens."""
    device = logits_NV.device
    options = [(one.sampling, uniform(one.sampling.seed, one.number)) for one in draws]
    columns = [(s.temperature, s.top_k or logits_NV.shape[-1], s.top_p, place) for s, place in options]
    temperature, top_k, top_p, places = (
        torch.tensor(columns, dtype=torch.float64, device=device).unsqueeze(-1).unbind(1)
    )
    scaled, order = logits_NV.double() / temperature, None
    if is_cut:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(scaled, dim=-1)
    if is_cut:
        ranks = torch.arange(scaled.shape[-1], device=device)
        probabilities = probabilities.masked_fill(ranks >= top_k, 0)
        kept = probabilities.sum(-1, keepdim=True)
        # The token at which the sum reaches top_p of the probability left by top_k is included.
        beyond = probabilities.cumsum(-1) - probabilities >= top_p * kept
        probabilities = probabilities.masked_fill(beyond & (ranks > 0), 0)
    sums = probabilities.cumsum(-1)
    found = torch.searchsorted(sums, places * sums[:, -1:], right=True).clamp(max=scaled.shape[-1] - 1)
    return (found if order is None else order.gather(-1, found)).squeeze(-1)
