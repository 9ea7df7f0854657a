"""Bytes that a rank keeps between forward and backward pass, layer by layer, and the pipeline's order of microbatches.

Two sets of modules keep different tensors: `reference` (this project's plain torch modules on a CPU; measured with autograd's
hooks in tests/launch/plan) and `te` (Transformer Engine and mamba-ssm kernels; from their sources, **not measured on a GPU**).

Bytes per token: h hidden width, e bytes of the recipe's format, q and k widths of queries and keys, f width of the MLP, D and C
channels of Mamba's projection and convolution, i its inner width (all on a tensor rank), i' = 1 if an FP8 copy is kept instead:

                        reference                                      te
    norm before         2 e h (in, out)                                the same           in low precision (e + 1) h
    attention           q, k, v, out in fp32, out in e, 4 a head       e (3q + 2k), RoPE + e k, 4 a head; low precision + q
    MLP                 2 e f     gated 3 e f                          the same, the last of them 1 byte in low precision
    Mamba-2             e D + 4 (C + i) + states + gated norm          e (D + 2 i) + i' i
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from recipes.schema.model import ModelConfig
from recipes.schema.pattern import GATED, LayerKind, mtp_kinds

Modules = Literal["reference", "te"]
LOSS_PART = 1 << 24
"""Number of logits that the loss processes at once on a GPU (`train.model.cross_entropy`)."""

ROUTER_BYTES = 14
"""Bytes that the router keeps of each token and expert."""

CPU_CHUNK_BYTES = 2 << 20
GPU_CHUNK_BYTES = 256 << 20
"""Bytes of logits in one chunk of the distillation loss, on a CPU and on a GPU (`train.distill.soft_targets`)."""


@dataclass(frozen=True)
class Shape:
    """Everything that the size of activations depends on."""

    model: ModelConfig
    modules: Modules
    size: int
    """Bytes of the recipe's format: 2 or 4."""
    rows: int
    sequence: int
    tensor: int
    context: int
    split_sequence: bool
    expert_tensor: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a context rank."""
        return self.rows * self.sequence // self.context

    @property
    def share(self) -> float:
        """Tokens of the residual stream on a tensor rank."""
        return self.tokens / (self.tensor if self.split_sequence else 1)

    @property
    def expert_rows(self) -> float:
        """Rows in this rank's experts if loads are balanced, with those that expert-tensor ranks process together."""
        return self.share * self.model.experts.top_k * self.expert_tensor


def hidden_bytes(shape: Shape) -> float:
    """The residual stream: a recomputed layer keeps only this, and pipeline stages send it to each other."""
    return shape.share * shape.model.hidden * shape.size


def layer_bytes(shape: Shape, kind: LayerKind, *, is_low: bool = False) -> float:
    """Bytes that one layer keeps for its backward pass."""
    m, e, tokens, te = shape.model, shape.size, shape.tokens, shape.modules == "te"
    copy = 1 if is_low and te else e
    h = m.hidden
    kept = shape.share * (h * (e + copy) + 4)
    if m.post_norms:
        kept += shape.share * (h * e + 4)
    match kind:
        case "-":
            f = m.ffn / shape.tensor
            kept += tokens * f * (_branches(m) * e + copy)
        case "E":
            kept += _expert_bytes(shape)
        case "*" | "w":
            kept += _attention_bytes(shape, copy=copy, is_low=is_low and te)
        case "M":
            heads = m.mamba_heads / shape.tensor
            inner = heads * m.mamba_head_dim
            groups = m.mamba_groups / shape.tensor
            conv = inner + 2 * groups * m.mamba_state
            projected = conv + inner + heads
            if te:
                kept += tokens * (e * (projected + 2 * inner) + copy * inner + 4 * groups)
            else:
                chunk = min(m.mamba_chunk, shape.sequence)
                chunks = -(-shape.sequence // chunk)
                # Context ranks exchange sequence for heads, so their share of the work stays the same.
                states = 4 * inner * m.mamba_state * shape.rows * chunks / shape.context
                kept += tokens * (e * projected + 4 * conv + 4 * inner + 2 * e * inner + 4 * groups) + states
    return kept


def head_bytes(shape: Shape) -> float:
    """Bytes of the final norm, the logits (overwritten by their gradient) and the labels. A scalar head keeps its input in
    fp32 and rewards instead of logits."""
    m, e = shape.model, shape.size
    norm = shape.share * (m.hidden * 2 * e + 4)
    if m.head == "scalar":
        return norm + shape.share * m.hidden * (4 if e == 2 else 0) + (4.0 + 8.0) * shape.tokens
    logits = float(e * shape.tokens * m.vocab / shape.tensor)
    return norm + logits + 8.0 * shape.tokens


def depths_bytes(shape: Shape) -> float:
    """Bytes that the further depths (`model.mtp`) keep: embeddings, three norms, the projection's input (whole on each tensor
    rank) and output, layers, and a pass of the head each. Recomputation is left out: an upper bound with it."""
    m, e = shape.model, shape.size
    norms = 3 * shape.share * (2 * m.hidden * e + 4)
    projection = 2 * shape.share * m.hidden * e + shape.tokens * m.hidden * e
    logits = float(e * shape.tokens * m.vocab / shape.tensor)
    layers = sum(layer_bytes(shape, kind) for kind in mtp_kinds(m))
    return m.mtp.depths * (norms + projection + layers + logits + 25.0 * shape.tokens)


def head_workspace(shape: Shape) -> float:
    """Temporary bytes in addition to the logits while the head runs: the logits that the loss processes at once in fp32
    (`train.model.cross_entropy`); on a CPU with a bf16 recipe, all logits or their gradient in fp32."""
    if shape.model.head == "scalar":
        return 4.0 * shape.share * shape.model.hidden  # the gradient of its input
    logits = shape.tokens * shape.model.vocab / shape.tensor
    if shape.modules == "reference":
        return 4.0 * logits if shape.size == 2 else 0.0
    return 16.0 * min(float(LOSS_PART), logits)


def distilled_head_bytes(shape: Shape) -> float:
    """Bytes of the final norm, the labels, and what the distillation loss (`train.distill.soft_targets`) keeps instead of logits:
    the gradients of the hidden states and of the head's weight, which it computes together with the loss."""
    m, e = shape.model, shape.size
    norm = shape.share * (m.hidden * 2 * e + 4)
    return norm + e * shape.tokens * m.hidden + 4.0 * m.vocab / shape.tensor * m.hidden + 8.0 * shape.tokens


def distilled_head_workspace(shape: Shape) -> float:
    """Temporary bytes, in fp32: one chunk of both models' logits, with their logarithms and the gradient; the product that is
    added to the weight's gradient; on a CPU with a bf16 recipe, a copy of the weight."""
    m = shape.model
    table = m.vocab / shape.tensor * m.hidden
    budget = CPU_CHUNK_BYTES if shape.modules == "reference" else GPU_CHUNK_BYTES
    chunk = min(max(float(budget), 64.0 * m.vocab / shape.tensor), 4.0 * shape.tokens * m.vocab / shape.tensor)
    in_fp32 = shape.modules == "reference" and shape.size == 2
    return 6 * chunk + (8.0 if in_fp32 else shape.size) * table


def layer_workspace(shape: Shape, pattern: str) -> float:
    """Temporary bytes of one layer's backward pass: the gradients of its widest activation and of its input."""
    m = shape.model
    routed = m.experts.ffn / shape.expert_tensor * shape.expert_rows / shape.tokens * shape.tensor
    widths = {
        "-": _branches(m) * m.ffn * 2.0,
        "E": 2.0 * _branches(m) * max(routed, m.experts.shared_ffn),
        "*": 2.0 * (m.heads + m.kv_heads) * m.head_dim,
        "w": 2.0 * (m.heads + m.kv_heads) * m.head_dim,
        "M": 2.0 * (3 * m.mamba_heads * m.mamba_head_dim + 2 * m.mamba_groups * m.mamba_state),
    }
    widest = max((widths[kind] for kind in pattern), default=0.0)
    gathered = m.hidden if shape.split_sequence else 0
    return shape.size * shape.tokens * (widest / shape.tensor + gathered) + 2 * hidden_bytes(shape)


def _branches(model: ModelConfig) -> int:
    return 2 if model.activation in GATED else 1


def _expert_bytes(shape: Shape) -> float:
    """An `E` layer without its norm: rows sorted by expert, both sides of the activation and outputs of the experts; the same of
    the shared expert; the router's scores in fp32 (logits, sigmoid and choices of every expert)."""
    m, e = shape.model, shape.size
    experts, rows = m.experts, shape.expert_rows
    width = experts.latent or m.hidden
    kept = rows * e * (width + (_branches(m) + 1) * experts.ffn / shape.expert_tensor)
    kept += shape.share * experts.top_k * (e * width + 12)  # outputs, weights, and the token of each
    kept += shape.share * e * 2 * experts.latent
    kept += shape.tokens * e * (_branches(m) + 1) * experts.shared_ffn / shape.tensor
    return kept + shape.share * (ROUTER_BYTES * experts.count + 24 * experts.top_k)


def _attention_bytes(shape: Shape, *, copy: int, is_low: bool) -> float:
    m, e, tokens = shape.model, shape.size, shape.tokens
    heads = m.heads / shape.tensor
    query, keys = heads * m.head_dim, m.kv_heads / shape.tensor * m.head_dim
    has_rope = m.position == "rope"
    kept = 4 * heads * tokens  # log-sum-exp of each row of scores, fp32
    if m.qk_norm:  # inputs of both norms, and the inverse root mean square of each head in fp32
        kept += tokens * (query + keys) * (e + 4 / m.head_dim)
    if shape.modules == "te":
        # Projection (its values are used without a copy), queries and keys (copied by RoPE), output.
        kept += tokens * e * (query + 2 * keys + (query + keys if has_rope else query) + query)
        return kept + (tokens * query if is_low else 0)
    if has_rope:
        kept += 16 * m.head_dim * shape.sequence / shape.context
    if shape.context > 1:
        seen = shape.rows * shape.sequence
        return kept + tokens * (4 * query + 4 * query + (e * query if e == 2 else 0)) + 8 * keys * seen
    if e == 2:
        return kept + tokens * (8 * query + 8 * keys + 2 * query)
    copies = query if has_rope or m.kv_heads // shape.tensor > 1 else 0
    flat = query
    return kept + 4 * tokens * (query + 2 * keys + copies + (keys if has_rope else 0) + query + flat)


def pipeline_schedule(*, stage: int, stages: int, virtual: int, microbatches: int) -> Iterator[tuple[int, int]]:
    """Megatron's order of passes on a pipeline rank: (+1, chunk) for a forward pass, (-1, chunk) for a backward pass.

    1F1B; interleaved if virtual > 1 (`schedules.py` of Megatron-Core).
    """
    total = microbatches * virtual
    later_stages = stages - stage - 1
    warmup = min(later_stages if virtual == 1 else 2 * later_stages + (virtual - 1) * stages, total)

    def chunk(step: int, forward: bool) -> int:
        index = step % (stages * virtual) // stages
        return index if forward else virtual - 1 - index

    for step in range(warmup):
        yield 1, chunk(step, True)
    for step in range(total - warmup):
        yield 1, chunk(step + warmup, True)
        yield -1, chunk(step, False)
    for step in range(total - warmup, total):
        yield -1, chunk(step, False)
