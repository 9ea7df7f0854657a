"""Fill in the middle (Bavarian et al., arXiv 2207.14255): a document is rearranged so that its middle comes last.

    PSM   <prefix> p <suffix> s <middle> m eod         SPM   <prefix> <suffix> s <middle> p m eod

Documents are cut at tokens, not characters. The three special tokens replace the document's first three, so that the length
of a row stays the same; `CROPPED_TOKENS` counts the three tokens of each rearranged document that are lost. Which documents
are rearranged, and where they are cut, is a function of (seed, source, the document's first token in the stream, epoch).
"""

from dataclasses import dataclass

import numpy as np

from recipes.schema.data import FimConfig
from recipes.schema.errors import DataError, Problem, refuse

CROPPED_TOKENS = 3
"""Tokens of a rearranged document that the special tokens replace."""
_SHORTEST = 8
"""Length in labels of the shortest document that is rearranged."""
_GOLDEN = 0x9E3779B97F4A7C15
"""Splitmix64's increment: 2**64 divided by the golden ratio."""
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Fim:
    """Rearranges documents, with the ids of its special tokens."""

    config: FimConfig
    prefix: int
    suffix: int
    middle: int
    eod: int

    def rearrange(self, labels: np.ndarray, *, key: int) -> np.ndarray:
        """The labels of one document (or part of one), rearranged or not, same length. key: seed of the random choices."""
        draws = _uniform(key)
        if len(labels) < _SHORTEST or draws[0] >= self.config.rate:
            return labels
        ends = labels[-1:] if labels[-1] == self.eod else labels[:0]
        body = labels[CROPPED_TOKENS : len(labels) - len(ends)]
        first, second = sorted((int(draws[1] * (len(body) + 1)), int(draws[2] * (len(body) + 1))))
        p, m, s = body[:first], body[first:second], body[second:]
        marks = np.array([self.prefix, self.suffix, self.middle], dtype=labels.dtype)
        if draws[3] < self.config.spm_rate:
            return np.concatenate([marks[:2], s, marks[2:], p, m, ends])
        return np.concatenate([marks[:1], p, marks[1:2], s, marks[2:], m, ends])


def build_fim(config: FimConfig, *, special: dict[str, int], eod: int) -> Fim | None:
    """None if the rate is 0. DataError if the tokenizer lacks a special token."""
    if not config.rate:
        return None
    refuse(fim_problems(config, special=special), DataError)
    return Fim(config, special[config.prefix], special[config.suffix], special[config.middle], eod)


def fim_problems(config: FimConfig, *, special: dict[str, int]) -> list[Problem]:
    """Special tokens of fill in the middle that a tokenizer does not have."""
    found = []
    for field in ("prefix", "suffix", "middle") if config.rate else ():
        name = getattr(config, field)
        if name not in special:
            text = f"data.fim.{field}={name!r} is not a special token of the tokenizer (it has: {', '.join(special)})."
            remedy = "Use special tokens that it has, or add them under data.tokenizer.special_tokens and prepare the data again."
            found.append(Problem(f"data.fim.{field}", text, remedy))
    return found


def fold_key(*numbers: int) -> int:
    """One key from several whole numbers."""
    key = 0
    for number in numbers:
        key = _mix((key ^ number) + _GOLDEN)
    return key


def _uniform(key: int) -> tuple[float, float, float, float]:
    """Four numbers in [0, 1) from a key."""
    a, b, c, d = ((_mix(key + _GOLDEN * step) >> 11) / 2**53 for step in range(1, 5))
    return a, b, c, d


def _mix(x: int) -> int:
    """Splitmix64's scrambling of a 64-bit number (Steele et al., OOPSLA 2014)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
