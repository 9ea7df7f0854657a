"""Fields of the `model` group: the shape of the model.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass, field
from typing import Literal

from recipes.schema.encoders import AudioConfig, VisionConfig
from recipes.schema.experts import ExpertsConfig
from recipes.schema.fields import Count, PositiveFloat, PositiveInt, SoftCap
from recipes.schema.lora import LoraConfig
from recipes.schema.mtp import MtpConfig


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model. Sizes are those of the whole model; each rank has its share."""

    pattern: str
    """One character a layer: `M` Mamba-2, `*` attention, `w` attention over a window, `-` MLP, `E` mixture of experts. `|` sets a
    cut between pipeline stages. A transformer block is two characters: Gemma 2 (arXiv 2408.00118) repeats `w-*-`."""
    hidden: PositiveInt
    """Width of the residual stream."""
    vocab: PositiveInt
    """Rows of the embedding and head, divisible by `parallel.tensor`. Without `vocab_padding`, the tokenizer's size."""
    vocab_padding: Count = 0
    """Number of last rows of `vocab` without a token: they are not in the softmax, learn nothing and are never generated. `vocab`
    minus this is the tokenizer's size. Must be less than `vocab` / `parallel.tensor`."""
    ffn: PositiveInt = 1024
    """Inner width of an MLP layer (per branch if gated)."""
    activation: Literal["squared_relu", "swiglu", "geglu", "gelu", "silu"] = "squared_relu"
    """Nonlinearity of MLPs and experts; `swiglu` and `geglu` are gated. Nemotron-H uses squared ReLU (arXiv 2504.03624)."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Experts of an `E` layer (docs/experts.md)."""
    mtp: MtpConfig = field(default_factory=MtpConfig)
    """Multi-token prediction (docs/mtp.md)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train low-rank adapters of linear layers instead of the weights themselves (docs/lora.md)."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Encoder of images and of frames of videos (docs/multimodal.md)."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    """Encoder of audio (docs/multimodal.md)."""
    heads: PositiveInt = 4
    """Query heads of an attention layer."""
    kv_heads: PositiveInt = 4
    """Key/value heads; with fewer than `heads`, attention is grouped-query. Must divide `heads`."""
    head_dim: PositiveInt = 64
    """Width of one attention head; heads x head_dim need not equal `hidden` (Nemotron Nano 9B-v2: 40 x 128 on 4,480)."""
    query_scale: PositiveFloat | None = None
    """Attention scores are divided by the square root of this; null: `head_dim`. Gemma 2 27B: 144 (hidden / heads)."""
    qk_norm: bool = False
    """Normalise each head's queries and keys by an RMSNorm with weights of their own, before rotary positions (arXiv 2302.05442,
    section 2; Megatron: `qk_layernorm`). Scores stay small. Not in any Hugging Face class that we export to."""
    window_tokens: PositiveInt = 4096
    """Tokens a `w` layer sees: the query's own and those before it. Gemma 2 (arXiv 2408.00118): 4,096."""
    attention_softcap: SoftCap | None = None
    """Attention scores s become c tanh(s / c) before mask and softmax; null: no cap. At most 70, because kernels sum exponentials
    without subtracting the largest score. Gemma 2: 50."""
    mamba_heads: PositiveInt = 8
    """Heads of a Mamba-2 layer; inner width = mamba_heads x mamba_head_dim."""
    mamba_head_dim: PositiveInt = 64
    """Channels of one Mamba-2 head."""
    mamba_state: PositiveInt = 64
    """State size N of a Mamba-2 head."""
    mamba_groups: PositiveInt = 1
    """Groups of heads that share B and C. Must divide `mamba_heads` and be divisible by `parallel.tensor`."""
    mamba_conv: PositiveInt = 4
    """Taps of the causal convolution before the scan."""
    mamba_chunk: PositiveInt = 64
    """Chunk of the scan, in tokens. It changes speed and rounding, not the function."""
    position: Literal["none", "rope"] = "none"
    """Positional embedding of attention layers. Hybrids need none: the Mamba layers carry order."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary angles, if `position` is `rope`."""
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"
    """How angles change for rows longer than those the model was trained on: `linear` divides them all by `rope_factor`
    (arXiv 2306.15595), `yarn` only the slow ones, and sharpens the softmax (arXiv 2309.00071), `llama3` only the slow ones
    (arXiv 2407.21783)."""
    rope_factor: PositiveFloat = 1.0
    """For `rope_scaling`: how many times longer rows become."""
    rope_original_tokens: PositiveInt = 8192
    """For `yarn` and `llama3`: row length on which the model was trained before the scaling."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    norm_offset: Literal[0, 1] = 0
    """RMSNorm multiplies by this plus its weight; with 1 (Gemma 2), weights start at zero. Not for the gated norm of Mamba-2."""
    post_norms: bool = False
    """Also normalise the output of a layer before it is added to the residual stream (Gemma 2)."""
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(hidden), rounded to the format of activations (Gemma 2)."""
    head: Literal["vocabulary", "scalar"] = "vocabulary"
    """What the model computes from the last hidden state: `vocabulary`, logits of the next token; `scalar`, one number, the
    reward of a text (a reward model, docs/align.md), which `objective.kind=reward` trains."""
    tie_embeddings: bool = False
    """Use the embedding matrix also as the output head. A scalar head is a weight of its own in any case."""
    logit_softcap: SoftCap | None = None
    """Logits z become c tanh(z / c) before the softmax; null: no cap. Gemma 2: 30. Rewards are not capped."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights. For projections back into the residual stream it is divided by
    sqrt(number of layers)."""

    @property
    def real_vocab(self) -> int:
        """Number of token ids: the vocabulary without its padding."""
        return self.vocab - self.vocab_padding

    @property
    def head_rows(self) -> int:
        """Outputs of the head: one for each row of the vocabulary, or one."""
        return 1 if self.head == "scalar" else self.vocab

    @property
    def has_encoders(self) -> bool:
        """Whether the model reads images or audio."""
        return self.vision.layers > 0 or self.audio.layers > 0

    @property
    def has_own_head(self) -> bool:
        """Whether the head is a weight of its own, not the embedding."""
        return self.head == "scalar" or not self.tie_embeddings
