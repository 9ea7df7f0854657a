"""The interface between the training loop and low precision, the same for all backends: begin a step, finish it, read health."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reading:
    """Quantisation error of one operand of one linear layer, over all ranks that have a part of it."""

    layer: int
    """Index in the pattern, 0 is the first."""
    linear: str
    """Name of the module inside the layer."""
    operand: str
    """input, weight, grad, input_for_weight_grad or grad_for_weight_grad (the last two only if quantised separately)."""
    format: str
    amax: float
    scale: float
    """Encoding scale of the block with the largest magnitude."""
    saturated: float
    """Fraction of elements more than half a step beyond the format's largest number after scaling."""
    underflowed: float
    """Fraction of elements that were not zero and became zero."""
    snr_db: float | None
    """10 log10(sum x^2 / sum (decoded - x)^2); None if x is all zero or the decoding is exact."""
    floor_db: float
    """An operand below this is unhealthy."""

    @property
    def is_healthy(self) -> bool:
        return self.snr_db is None or self.snr_db >= self.floor_db


class PrecisionControl(Protocol):
    """The low-precision state of this rank's part of the model."""

    @abstractmethod
    def begin_step(self, *, step: int, tokens: int, measure: bool = False) -> None:
        """Before the first microbatch of a step that starts after `step` steps and `tokens` tokens.

        measure: take readings of this step's quantised operands.
        """

    @abstractmethod
    def finish_step(self) -> None:
        """After the weights were updated: update amax histories and scales. Collective over the ranks that share amaxes."""

    @abstractmethod
    def health(self) -> list[Reading]:
        """Readings of the last measured step, merged over ranks, in the order of the layers. Collective over the world.

        Applies `precision.health_policy`.
        """

    @abstractmethod
    def gather_state(self) -> None:
        """Before a checkpoint is written: put scales and amax histories into the modules' buffers."""

    @abstractmethod
    def apply_state(self) -> None:
        """After a checkpoint was loaded: read scales and amax histories from the modules' buffers."""

    @abstractmethod
    def active(self) -> str:
        """Name of the scaling in use now; "none" for high precision."""
