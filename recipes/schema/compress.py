"""Fields of the `compress` section: scoring, pruning and searching.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class CompressConfig:
    """Scoring, pruning and searching (`stratum compress`, docs/compress.md); training does not read it."""

    parent: str | None = None
    """The model to compress: a checkpoint folder, or a run folder (its newest checkpoint)."""
    folder: str = "runs/compress"
    """Scores, pictures and pruned checkpoints lie in `folder`/`run.name`."""
    calibration_rows: PositiveInt = 1024
    """Training rows, from position 0, over which widths and block influence are scored (Minitron: 1,024)."""
    depth_rows: PositiveInt = 128
    """Rows for the removal scores, which take one pass per layer and round (Nemotron-H: 128)."""
    depth_metric: Literal["logit_mse", "perplexity", "block_influence"] = "logit_mse"
    """What decides which layer goes next: squared error of the logits, rise of the next-token loss, or (without trying)
    1 - cos between a layer's input and output."""
    layers: Count = 0
    """Layers left after pruning; 0 keeps all."""
    attention_layers: Count | None = None
    """Attention layers among them; null leaves that to the scores. Nano 2's search fixed 4."""
    hidden: Count = 0
    """Width of the residual stream; 0 keeps it. So for the four below."""
    ffn: Count = 0
    """Inner width of MLP layers (per branch)."""
    heads: Count = 0
    """Query heads: an equal number of each key/value head's. Key/value heads stay."""
    merge_heads: bool = False
    """Add to the weakest query heads kept what separates them from the strongest dropped (Minitron, arXiv 2407.14679, section
    2.3)."""
    mamba_heads: Count = 0
    """Mamba-2 heads: an equal number of each group. Groups and state size stay."""
    mamba_head_dim: Count = 0
    """Channels of a Mamba-2 head, the same in all heads of a layer."""
    search_layers: str = ""
    """Sizes to try, as [52,54,56] or first:last:step; empty tries the size above only. So for the four below."""
    search_hidden: str = ""
    """Widths of the residual stream to try."""
    search_ffn: str = ""
    """MLP widths to try."""
    search_heads: str = ""
    """Query heads to try."""
    search_mamba_heads: str = ""
    """Mamba-2 heads to try."""
    budget_parameters: Count = 0
    """Parameters, met within `budget_tolerance`; 0: no such limit."""
    budget_tolerance: Fraction = 0.05
    """Relative distance from `budget_parameters` allowed (Minitron: 5 %)."""
    budget_gib: NonNegativeFloat = 0.0
    """Memory for weights, key/value cache and Mamba states in 16 bits, GiB; 0: no limit. Nano 2: 19.66."""
    budget_context_tokens: PositiveInt = 131072
    """Tokens of context that memory must hold, for each row of the batch."""
    budget_batch: PositiveInt = 1
    """Rows generated at once."""
    budget_tokens_per_s: NonNegativeFloat = 0.0
    """Least generation speed by the roofline of the device below; 0: no limit."""
    device_gb_per_s: PositiveFloat = 600.0
    """Memory bandwidth of the device the model is for. A10G: 600 (NVIDIA data sheet)."""
    device_tflops: PositiveFloat = 70.0
    """Its dense bf16 peak. A10G: 70."""
    candidates: PositiveInt = 3
    """Best candidates that are pruned and get a short distillation each (Nano 2: 3)."""
