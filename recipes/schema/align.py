"""Fields of `objective.dpo` and `objective.reward`: learning from preferences.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import HalfFraction, NonNegativeFloat, PositiveFloat


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation (arXiv 2305.18290; docs/align.md)."""

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference. 0.1 is the paper's usual value."""
    label_smoothing: HalfFraction = 0.0
    """Probability with which a pair is assumed to be the wrong way round (conservative DPO)."""
    length_normalized: bool = False
    """Divide the log-ratio of an answer to the reference by its tokens, so that long answers do not count more."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy of the chosen answers, in nats per token, which keeps them likely."""
    reference: str | None = None
    """The model that answers are compared with: a checkpoint folder, or a run folder (its newest checkpoint). null: the
    weights of `run.start_from`."""
    reference_log_probs: Literal["cached", "online"] = "cached"
    """`cached`: compute the reference's log-probabilities of all rows of the run before step 1 and keep them in the run's
    folder. `online`: keep the reference in memory and compute them at every step."""


@dataclass(frozen=True)
class RewardConfig:
    """Training of a reward model (docs/align.md)."""

    center_weight: NonNegativeFloat = 0.0
    """Weight of (better reward + worse reward)^2 in the loss of a pair, which keeps rewards near 0; otherwise only their
    differences are learned. TRL's documentation recommends 0.01 (arXiv 2312.09244)."""
