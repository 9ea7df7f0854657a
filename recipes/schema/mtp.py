"""Fields of the `model.mtp` group: multi-token prediction (arXiv 2412.19437, section 2.2; Megatron-Core's `mtp_*` options).

    h_0(t)  hidden state of token t after the final norm
    h_k(t) = norm(layers(projection[norm(embedding of token t + k), norm(h_k-1(t))]))     head(h_k(t)) predicts token t + k + 1

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass

from recipes.schema.fields import Depths, PositiveFloat


@dataclass(frozen=True)
class MtpConfig:
    """Depths that predict further tokens. They share embedding and head with the model (docs/mtp.md)."""

    depths: Depths = 0
    """Number of further tokens that each position predicts (Megatron: `mtp_num_layers`); 0: none. Nemotron 3 Super: 2."""
    pattern: str = "*-"
    """Layers of one depth, in the letters of `model.pattern` (Megatron writes them behind `/`). Nemotron 3 Super: `*E`."""
    repeated: bool = False
    """Use one set of weights for all depths (Megatron: `mtp_use_repeated_layer`), as Nemotron 3 Super does."""
    loss_scale: PositiveFloat = 0.1
    """The mean of the depths' losses is added to the loss with this factor (Megatron: `mtp_loss_scaling_factor`, also 0.1).
    Nemotron 3 Super: 0.3."""

    @property
    def sets(self) -> int:
        """Number of sets of weights."""
        return min(self.depths, 1) if self.repeated else self.depths
