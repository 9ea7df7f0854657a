"""Draws the next tokens of a batch from logits: each text with its own options and random numbers.

A text's random number for its n-th token is a hash of its seed and n. So a text gets the same tokens in any batch, after it had
to wait, and on every tensor rank, and no state of a generator has to be stored.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from train.inference.request import Sampling


@dataclass(frozen=True)
class Draw:
    """The options for one line of logits."""

    sampling: Sampling
    number: int
    """Number of tokens that the text has generated so far."""


def uniform(seed: int, number: int, purpose: str = "") -> float:
    """A number in [0, 1) with 53 random bits, a function of the arguments (BLAKE2b, RFC 7693)."""
    digest = hashlib.blake2b(f"{seed} {number}{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def uniforms(draws: Sequence[Draw], device: torch.device, purpose: str = "") -> torch.Tensor:
    """Such a number for each draw, float64 [N, 1]."""
    numbers = [uniform(one.sampling.seed, one.number, purpose) for one in draws]
    return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]


def draw(logits_NV: torch.Tensor, draws: Sequence[Draw], likeliest_N: torch.Tensor | None = None) -> torch.Tensor:
    """One token for each line of logits, [N]. A line's token depends on that line only. likeliest_N: argmax, if it is known."""
    tokens = logits_NV.argmax(dim=-1) if likeliest_N is None else likeliest_N.clone()
    for lines, weights in _kinds(logits_NV, draws):
        tokens[lines] = draw_from(weights, uniforms([draws[line] for line in lines], logits_NV.device))
    return tokens


def draw_from(weights_NV: torch.Tensor, places_N1: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution at each line's random number, [N]. Weights need not sum to one."""
    sums = weights_NV.cumsum(-1)
    found = torch.searchsorted(sums, places_N1 * sums[:, -1:], right=True)
    return found.clamp(max=weights_NV.shape[-1] - 1)[:, 0]


def distribution(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The distribution that `draw` draws from: after temperature, top_k and top_p, float64 [N, V]. Temperatures above 0."""
    result = torch.empty(logits_NV.shape, dtype=torch.float64, device=logits_NV.device)
    for lines, weights in _kinds(logits_NV, draws):
        result[lines] = weights / weights.sum(-1, keepdim=True)
    return result


def _kinds(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(lines, their weights) of the lines that are not greedy: those of whole distributions, then those whose tail is cut."""
    warm = [line for line, one in enumerate(draws) if one.sampling.temperature > 0]
    for is_cut in (False, True):
        lines = [line for line in warm if _is_cut(draws[line].sampling) == is_cut]
        if lines:
            some = logits_NV if len(lines) == len(draws) else logits_NV[lines]
            yield lines, _weights(some, [draws[line].sampling for line in lines], is_cut=is_cut)


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _weights(logits_NV: torch.Tensor, samplings: Sequence[Sampling], *, is_cut: bool) -> torch.Tensor:
    """Probabilities, 0 for tokens of the tail, float64 [N, V]."""
    device = logits_NV.device
    columns = [(s.temperature, s.top_k or logits_NV.shape[-1], s.top_p) for s in samplings]
    temperature, top_k, top_p = torch.tensor(columns, dtype=torch.float64, device=device).unsqueeze(-1).unbind(1)
    scaled = logits_NV.double() / temperature
    if not is_cut:
        return torch.softmax(scaled, dim=-1)
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(scaled, dim=-1)
    ranks = torch.arange(scaled.shape[-1], device=device)
    probabilities = probabilities.masked_fill(ranks >= top_k, 0)
    kept = probabilities.sum(-1, keepdim=True)
    # The token at which the sum reaches top_p of the probability left by top_k is included.
    beyond = probabilities.cumsum(-1) - probabilities >= top_p * kept
    probabilities = probabilities.masked_fill(beyond & (ranks > 0), 0)
    # Back in the order of the vocabulary: in sorted order, rounding could swap two tokens that are equally likely, and so change
    # what a random number draws.
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)
