"""Fields of the `compress` section: scoring, pruning and searching.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class CompressConfig:
    """Scoring, pruning and searching (`stratum compress`, docs/compress.md). Training does not read this section."""

    parent: str | None = None
    """The model to compress: a checkpoint folder, or a run folder (its newest checkpoint)."""
    folder: str = "runs/compress"
    """Scores, pictures and pruned checkpoints are written to `folder`/`run.name`."""
    calibration_rows: PositiveInt = 1024
    """Number of training rows, from position 0, to score widths and block influence on (Minitron: 1,024)."""
    depth_rows: PositiveInt = 128
    """Rows for the removal scores, which take one pass per layer and round (Nemotron-H: 128)."""
    depth_metric: Literal["logit_mse", "perplexity", "block_influence"] = "logit_mse"
    """How the next layer to remove is chosen: squared error of the logits, increase of the next-token loss, or
    1 - cos between a layer's input and output (without removal trials)."""
    layers: Count = 0
    """Layers left after pruning; 0 keeps all."""
    attention_layers: Count | None = None
    """How many of them are attention layers; null leaves it to the scores. Nano 2's search fixed 4."""
    hidden: Count = 0
    """Width of the residual stream. Here and in the four fields below, 0 keeps the parent's size."""
    ffn: Count = 0
    """Inner width of MLP layers (per branch)."""
    heads: Count = 0
    """Query heads, the same number for each key/value head. Key/value heads are not pruned."""
    merge_heads: bool = False
    """Add to the weakest kept query heads their difference from the strongest dropped ones (Minitron, arXiv 2407.14679, section
    2.3)."""
    mamba_heads: Count = 0
    """Mamba-2 heads, the same number in each group. Groups and state size are not pruned."""
    mamba_head_dim: Count = 0
    """Channels per Mamba-2 head; the same channels are kept in all heads of a layer."""
    search_layers: str = ""
    """Numbers of layers to try, as [52,54,56] or first:last:step. Here and in the four fields below, empty tries only the
    size set above."""
    search_hidden: str = ""
    """Widths of the residual stream to try."""
    search_ffn: str = ""
    """MLP widths to try."""
    search_heads: str = ""
    """Query heads to try."""
    search_mamba_heads: str = ""
    """Mamba-2 heads to try."""
    budget_parameters: Count = 0
    """Target number of parameters, met within `budget_tolerance`; 0: no limit."""
    budget_tolerance: Fraction = 0.05
    """Allowed relative distance from `budget_parameters` (Minitron: 5 %)."""
    budget_gib: NonNegativeFloat = 0.0
    """Memory for weights, key/value cache and Mamba states in 16 bits, GiB; 0: no limit. Nano 2: 19.66."""
    budget_context_tokens: PositiveInt = 131072
    """Tokens of context, for each row of the batch, that must fit into memory."""
    budget_batch: PositiveInt = 1
    """Rows generated at the same time."""
    budget_tokens_per_s: NonNegativeFloat = 0.0
    """Minimum generation speed, by the roofline of the device below; 0: no limit."""
    device_gb_per_s: PositiveFloat = 600.0
    """Memory bandwidth of the device the model is for. A10G: 600 (NVIDIA data sheet)."""
    device_tflops: PositiveFloat = 70.0
    """Its dense bf16 peak. A10G: 70."""
    candidates: PositiveInt = 3
    """Number of best candidates that are pruned, each for a short distillation (Nano 2: 3)."""
