"""What a batch carries to every layer besides its hidden states: document boundaries, and caches when generating.

Megatron hands `packed_seq_params` through the schedules, the recompute function and every layer down to the mixer and
the attention core, so `RowContext` extends that class instead of adding a second way.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class LayerCaches:
    """State of a generation in progress: grows with the text for attention only, up to its window where it has
    one; stays the same size for Mamba-2."""

    length: int = 0
    """Tokens already in the caches."""
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """By layer number: keys and values, each [length, rows, kv heads, head width]; a layer with a window keeps the last
    window_tokens - 1 only."""
    mamba: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """By layer number: the convolution's last inputs and the scan's fp32 state (shapes: train.model.ssd)."""


@dataclass
class RowContext(PackedSeqParams):
    """Extras of one microbatch. Rows stay [sequence, rows, hidden] ("sbhd"); documents are told apart by index."""

    qkv_format: str = "sbhd"
    documents: torch.Tensor | None = None
    """[rows, sequence] int: document of each token of the whole row (also under context parallelism); None: one."""
    caches: LayerCaches | None = None
    """Set while generating."""
    masks: dict[tuple[int | None, ...], Any] = field(default_factory=dict)
    """Attention masks that layers of this microbatch share (`train.model.flex`)."""

    def __post_init__(self) -> None:
        """Megatron's stock mixer hands `seq_idx` to mamba-ssm's kernels, which reset where it changes."""
        super().__post_init__()
        if self.documents is not None:
            self.seq_idx = self.documents.to(torch.int32).contiguous()
