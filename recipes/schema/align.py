"""Fields of `objective.reward`: training of reward models.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass

from recipes.schema.fields import NonNegativeFloat


@dataclass(frozen=True)
class RewardConfig:
    """Training of a reward model (docs/align.md)."""

    center_weight: NonNegativeFloat = 0.0
    """Weight of (better reward + worse reward)^2 in the loss of a pair, which keeps rewards near 0; otherwise only their
    differences are learned. TRL's documentation recommends 0.01 (arXiv 2312.09244)."""
