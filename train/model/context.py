"""What every layer receives in addition to hidden states: document boundaries, and caches during generation.

Megatron passes `packed_seq_params` through the schedules, activation recomputation and every layer to the mixer and the
attention core. `RowContext` extends that class, so no second path is needed.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class LayerCaches:
    """State of one generation. Attention caches grow with the text (with a window: up to its size); Mamba-2 states have a
    constant size."""

    length: int = 0
    """Tokens already in the caches."""
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """By layer number: keys and values, each [length, rows, kv heads, head width]; a layer with a window keeps the last
    window_tokens - 1 only."""
    mamba: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """By layer number: the convolution's last inputs and the scan's fp32 state (shapes: train.model.ssd)."""


@dataclass
class RowContext(PackedSeqParams):
    """Extra inputs of one microbatch. Rows stay [sequence, rows, hidden] ("sbhd"); documents are given by index."""

    qkv_format: str = "sbhd"
    documents: torch.Tensor | None = None
    """[rows, sequence] int: document of each token of the whole row (also under context parallelism). None: one document."""
    caches: LayerCaches | None = None
    """Set during generation only."""
    masks: dict[tuple[int | None, ...], Any] = field(default_factory=dict)
    """Attention masks that layers of this microbatch share (`train.model.flex`)."""

    def __post_init__(self) -> None:
        """Megatron's stock mixer passes `seq_idx` to mamba-ssm's kernels, which reset the state where it changes."""
        super().__post_init__()
        if self.documents is not None:
            self.seq_idx = self.documents.to(torch.int32).contiguous()
