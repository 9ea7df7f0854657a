"""Fields of the `optim` and `schedule` groups: the optimizer, and its learning rate over time.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Fraction, Length, NonNegativeFloat, OpenFraction, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) with fp32 masters, sharded over the data-parallel ranks."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate. The schedule multiplies it."""
    beta1: OpenFraction = 0.9
    """Decay of the first moment."""
    beta2: OpenFraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay. Norm weights, biases, A_log, D and dt_bias are never decayed."""
    clip_norm: NonNegativeFloat = 1.0
    """Larger global gradient norms are scaled down to this; 0: no clipping."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over time, as a factor of `optim.lr`."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """`wsd`: warm-up, stable, decay; `cosine`: warm-up, half a cosine; `constant`: warm-up, then 1."""
    unit: Literal["steps", "tokens"] = "steps"
    """Unit of `warmup`, `decay` and `total`."""
    warmup: Length = 0
    """Length of the linear rise from 0: steps or tokens, or below 1 a fraction of the whole schedule (0.1: a tenth of the run),
    rounded down."""
    decay: Length = 0
    """`wsd` only: length of the decay at the end, given like `warmup`."""
    total: PositiveInt | None = None
    """End of the decay; null: the end of the run (`run.steps`)."""
    final_fraction: Fraction = 0.01
    """Factor at the end of the decay (Nemotron Nano 2: 4.5e-6 / 4.5e-4 = 0.01)."""
    decay_shape: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "minus_sqrt"
    """Shape of the `wsd` decay: with t from 0 to 1, `minus_sqrt` is 1 - sqrt(t) (arXiv 2405.18392)."""
