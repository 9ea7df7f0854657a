"""Fields of `run.integrity`: detection of silent data corruption, that is, of finite wrong numbers.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass

from recipes.schema.fields import Count, Fraction


@dataclass(frozen=True)
class IntegrityConfig:
    """Detection of silent data corruption (docs/resilience.md). A rank that computes wrong numbers ends the run with status 4."""

    enabled: bool = False
    """Compare state and replay steps as the next two fields say."""
    compare_every_steps: Count = 25
    """Every so many steps, fingerprint weights and optimizer state: weights must be equal on all data-parallel ranks, and masters
    and moments must be as the update before left them. 1 watches masters and moments all the time. 0: never."""
    replay_fraction: Fraction = 0.0025
    """Share of steps whose gradient is computed again on the same rank and on the next data-parallel rank, and compared bit for
    bit. Each costs about two more steps (the default, as Gemini 2.5 reports it: 0.5 % of the time)."""
