"""Fields of `run.integrity`: detection of silent data corruption (numbers that are wrong but finite).

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass

from recipes.schema.fields import Count, Fraction


@dataclass(frozen=True)
class IntegrityConfig:
    """Detection of silent data corruption (docs/resilience.md). A rank that computes wrong numbers ends the run with status 4."""

    enabled: bool = False
    """Compare state and replay steps, as set by the next two fields."""
    compare_every_steps: Count = 25
    """Steps between fingerprints of weights and optimizer state. Weights must be equal on all data-parallel ranks; masters and
    moments must not have changed since the previous update. 1 watches masters and moments all the time. 0: never."""
    replay_fraction: Fraction = 0.0025
    """Share of steps whose gradient is computed again on the same rank and on the next data-parallel rank, and compared bit for
    bit. Each costs about two more steps: 0.5 % of the time with the default, which is the share that Gemini 2.5 reports."""
