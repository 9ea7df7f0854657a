"""Fields of the `objective` group: what the model is trained to do.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass, field
from typing import Literal

from recipes.schema.align import DpoConfig, GrpoConfig, RewardConfig
from recipes.schema.fields import Count, NonNegativeFloat, Temperature

PREFERENCE_OBJECTIVES = ("dpo", "reward")
"""Objectives that learn from preferences (`kind: preference` of a source)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model is trained to do: predict the next token, match a teacher (docs/compress.md), prefer answers, reward them or
    earn rewards (docs/align.md)."""

    kind: Literal["next_token", "distill", "dpo", "reward", "grpo"] = "next_token"
    """`next_token`: cross-entropy of the labels. `distill`: match a teacher's whole distribution (Gemma 2,
    arXiv 2408.00118; Minitron, arXiv 2407.14679). `dpo`: make the better of two answers more likely than the worse one, compared
    with a reference. `reward`: give the better of two answers the higher reward. `grpo`: raise the rewards of the model's own
    answers. A nested group belongs to the kind of its name, `z_loss` to `next_token`, all other fields to `distill`."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the squared log-sum-exp of the logits, which is added to the loss of each label and keeps logits small
    (PaLM, arXiv 2204.02311, section 5: 1e-4). Logits are those of the softmax, after `model.logit_softcap`. The reported loss
    does not contain it. 0: none."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    """Direct preference optimisation."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How a reward model is trained."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """Reinforcement learning from rewards."""
    teacher: str | None = None
    """The teacher: a checkpoint folder, or a run folder (its newest checkpoint). Pattern, size and family may
    differ; vocabulary and tokenizer must be the student's."""
    teacher_tensor: Count = 0
    """Ranks that share each of the teacher's matrices, independent of the student's layout; 0: `parallel.tensor`."""
    teacher_params: Literal["as_student", "fp32", "bf16"] = "as_student"
    """Format of the teacher's weights and activations."""
    teacher_scaling: Literal["none", "current", "blockwise", "mxfp8", "nvfp4"] = "none"
    """Low-precision recipe of the teacher's linear layers (docs/fp8.md)."""
    teacher_cache: str | None = None
    """Folder written by `stratum teacher-cache`: read the teacher's most likely tokens from it instead of running the
    teacher."""
    trust_tokenizer: bool = False
    """Accept a teacher whose checkpoint does not record its tokenizer (a recorded tokenizer that differs is always
    refused)."""
    top_k: Count = 0
    """Use only the teacher's k most likely tokens and the total probability of all others; 0: the whole distribution. With k the
    reported loss is lower, because it ignores differences within the rest."""
    divergence: Literal["kl", "cross_entropy"] = "kl"
    """`kl`: KL(teacher || student), 0 if they agree. `cross_entropy`: KL plus the teacher's entropy, as in Gemma 2.
    Their gradients are the same."""
    temperature: Temperature = 1.0
    """Divides both models' logits; the divergence is multiplied by its square (arXiv 1503.02531). Minitron found 1 best."""
    distill_weight: NonNegativeFloat = 1.0
    """Weight of the divergence."""
    next_token_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy with the labels. Minitron found the divergence alone best."""
    hidden_match: Literal["none", "cosine", "mse"] = "none"
    """Also match hidden states: `cosine` distance, or squared error over the teacher's mean square. Teacher and
    student must have the same width, or the student must be pruned (its kept channels are compared). Minitron uses it
    for large cuts in depth."""
    hidden_layers: str = "final"
    """Which states to match: `final` (after the final norm), or pairs student:teacher of layer numbers from 0, e.g.
    `3:5,7:11`. Under pipeline parallelism the student's layers must be on the last stage."""
    hidden_weight: NonNegativeFloat | None = None
    """Weight of the hidden-state match; null weights each row so that the match counts as much as the divergence (Minitron's
    alpha = L_logits / L_hidden)."""
    chunk_tokens: Count = 0
    """Tokens whose logits are in memory at the same time; 0: chosen by device and vocabulary."""
