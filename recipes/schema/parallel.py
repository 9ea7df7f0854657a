"""Fields of the `parallel` group: degrees of parallelism.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import PositiveInt


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. The data-parallel degree is the world divided by the others."""

    tensor: PositiveInt = 1
    """Ranks that share each matrix."""
    pipeline: PositiveInt = 1
    """Number of stages into which the layers are cut."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks per stage (interleaved schedule); 1: the plain schedule."""
    context: PositiveInt = 1
    """Ranks that share each sequence."""
    expert: PositiveInt = 1
    """Ranks that share the experts of an `E` layer: each has `model.experts.count` / this many. They are taken from the tensor,
    context and data ranks of a stage."""
    expert_tensor: PositiveInt = 1
    """Ranks that share the matrices of each expert."""
    sequence: bool = False
    """Sequence parallelism: the tensor ranks split norms and residuals along the sequence. Needs tensor > 1."""
    recompute: Literal["none", "full"] = "none"
    """`full` stores only layer inputs and recomputes the rest in the backward pass: less memory, about 1/3 more work."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs. Needs overlap_grad_reduce."""
