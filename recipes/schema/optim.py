"""Fields of the `optim` and `schedule` groups: the optimizer, and its learning rate over time.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass, field
from typing import Literal

from recipes.schema.fields import Fraction, Length, NonNegativeFloat, OpenFraction, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class MuonConfig:
    """Muon (https://kellerjordan.github.io/posts/muon/), with weight decay and update scale of Moonlight (arXiv 2502.16982)."""

    momentum: OpenFraction = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Whether to orthogonalize a mean of the momentum and the gradient (Nesterov), or the momentum alone."""
    iterations: PositiveInt = 5
    """Newton-Schulz iterations, with the published coefficients (3.4445, -4.7750, 2.0315)."""
    split_fused: bool = True
    """Whether fused projections are separate matrices: queries, keys and values; z, x, B, C and dt of Mamba-2; the branches of a
    gated MLP. false: each weight as it is stored is one matrix. Each expert is always a matrix of its own."""


@dataclass(frozen=True)
class ParameterGroupConfig:
    """Other rates for some parameters."""

    match: str
    """Pattern of names in the whole model, as `stratum checkpoint show --tensors` prints them without components: `embedding.*`,
    `decoder.layers.*.mixer.A_log`, `*norm.weight`. `*` stands for any characters. A pattern that matches nothing is an error."""
    lr_factor: NonNegativeFloat = 1.0
    """Multiplies `optim.lr` for these parameters (0.1 for `embedding.*`: a lower rate for the embedding alone); 0: frozen."""
    weight_decay: NonNegativeFloat | None = None
    """Replaces `optim.weight_decay`, also for parameters that are not decayed otherwise; null: unchanged."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, with fp32 masters, sharded over the data-parallel ranks."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw`: AdamW (arXiv 1711.05101) for all parameters. `muon`: Muon for the matrices of layers, and AdamW for embedding,
    head, norms, convolutions, biases, A_log, D and dt_bias. Both use `lr` and `weight_decay`: Muon's updates are scaled to the
    size of AdamW's."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """How Muon updates matrices; refused with `kind: adamw`."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate. The schedule multiplies it."""
    beta1: OpenFraction = 0.9
    """AdamW: decay of the first moment."""
    beta2: OpenFraction = 0.95
    """AdamW: decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay. Norm weights, biases, A_log, D and dt_bias are never decayed."""
    clip_norm: NonNegativeFloat = 1.0
    """Larger global gradient norms are scaled down to this; 0: no clipping."""
    groups: tuple[ParameterGroupConfig, ...] = ()
    """Other rates for some parameters. The first rule that matches a parameter applies to it."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over time, as a factor of `optim.lr`."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """`wsd`: warm-up, stable, decay; `cosine`: warm-up, half a cosine; `linear`: warm-up, a straight line down to
    `final_fraction` (0: arXiv 2502.15938); `constant`: warm-up, then 1."""
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
