"""Fields of the `objective` group: what the model is trained to do.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import Count, NonNegativeFloat, PositiveFloat


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model is trained to do: predict the next token, or agree with a teacher (docs/compress.md)."""

    kind: Literal["next_token", "distill"] = "next_token"
    """`next_token`: cross-entropy of the labels. `distill`: agree with a teacher's whole distribution (Gemma 2,
    arXiv 2408.00118; Minitron, arXiv 2407.14679); the other fields of this group are for it."""
    teacher: str | None = None
    """The teacher: a checkpoint folder, or a run folder (its newest checkpoint). Any pattern, size and family with the
    student's vocabulary and tokenizer."""
    teacher_tensor: Count = 0
    """Ranks that share each of the teacher's matrices, whatever the student's layout; 0 takes `parallel.tensor`."""
    teacher_params: Literal["as_student", "fp32", "bf16"] = "as_student"
    """Format of the teacher's weights and activations."""
    teacher_scaling: Literal["none", "current", "blockwise", "mxfp8", "nvfp4"] = "none"
    """Low-precision recipe of the teacher's linear layers (docs/fp8.md)."""
    teacher_cache: str | None = None
    """Folder written by `stratum teacher-cache`: read the teacher's most likely tokens from there instead of
    running it."""
    trust_tokenizer: bool = False
    """Accept a teacher whose checkpoint does not say which tokenizer it was trained with (one that says so and differs is
    always refused)."""
    top_k: Count = 0
    """Use only the teacher's k most likely tokens and the mass of all others together; 0 uses the whole distribution.
    Lowers the loss reported by what the teacher and student disagree on within the rest."""
    divergence: Literal["kl", "cross_entropy"] = "kl"
    """`kl`: KL(teacher || student), 0 where they agree. `cross_entropy`: that plus the teacher's entropy, as Gemma 2
    writes it. Their gradients are the same."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the divergence is multiplied by its square (arXiv 1503.02531). Minitron found 1 best."""
    distill_weight: NonNegativeFloat = 1.0
    """Weight of the divergence."""
    next_token_weight: NonNegativeFloat = 0.0
    """Weight of the labels' cross-entropy. Minitron found the divergence alone best."""
    hidden_match: Literal["none", "cosine", "mse"] = "none"
    """Also match hidden states: `cosine` distance, or squared error over the teacher's mean square. Needs teacher and
    student of one width, or a pruned student (its kept channels are compared). Minitron: for large cuts in depth."""
    hidden_layers: str = "final"
    """Which: `final` (after the final norm), or pairs student:teacher of layer numbers from 0, e.g. `3:5,7:11`. Under
    pipeline parallelism the student's layers must be on the last stage."""
    hidden_weight: NonNegativeFloat | None = None
    """Weight of the hidden-state match; null weighs each row so that it counts as much as the divergence (Minitron's
    alpha = L_logits / L_hidden)."""
    chunk_tokens: Count = 0
    """Tokens whose logits exist at a time; 0 chooses by the device and the vocabulary."""
