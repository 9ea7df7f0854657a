"""Fields of the `evaluate` group: held-out evaluation during training.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass

from recipes.schema.fields import Count, PositiveInt


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation during training."""

    every_steps: Count = 100
    """Evaluate at every multiple of this step, and at the start and end; 0 evaluates at the start and end only."""
    rows_per_source: PositiveInt = 32
    """Held-out rows of each source that are scored (all of them where there are fewer)."""
