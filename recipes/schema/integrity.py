"""Fields of `run.integrity`: detection of silent data corruption (numbers that are wrong but finite).

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, Fraction

CHECKED_KINDS = {"M": "mamba", "*": "attention", "w": "attention", "-": "mlp", "E": "experts"}
"""Names in `products` of the layer kinds of a pattern; `output` is the head."""


@dataclass(frozen=True)
class IntegrityConfig:
    """Detection of silent data corruption (docs/resilience.md). A rank that computes wrong numbers ends the run with status 4."""

    enabled: bool = False
    """Compare state, replay steps, and check products and collectives, as set by the next fields."""
    compare_every_steps: Count = 25
    """Steps between fingerprints of weights and optimizer state. Weights must be equal on all data-parallel ranks; masters and
    moments must not have changed since the previous update. 1 watches masters and moments all the time. 0: never."""
    replay_fraction: Fraction = 0.0025
    """Share of steps whose gradient is computed again on the same rank and on the next data-parallel rank, and compared bit for
    bit. Each costs about two more steps: 0.5 % of the time with the default, which is the share that Gemini 2.5 reports."""
    products: tuple[Literal["attention", "mamba", "mlp", "experts", "output"], ...] = ()
    """Kinds of layers whose matrix products are checked by sums at every step, forward and backward. On a CPU only: Transformer
    Engine's products cannot be checked. Default: none, because the sums of all kinds cost half a step at the smoke size."""
    collectives: bool = False
    """Whether the results of collectives in training steps are checked: sums of sums, and fingerprints of copies."""
