"""The layer pattern of a hybrid model, and what follows from it alone: stages, parameter counts, FLOPs.

A pattern such as `M-M*-M-M*-` names one residual layer per character: `M` Mamba-2, `*` attention, `-` MLP. `|` fixes
where pipeline stages are cut. Standard library only: the planner runs this on a login node.
"""

from dataclasses import dataclass
from typing import Literal, cast

from train.config import ModelConfig
from train.errors import RecipeError

LayerKind = Literal["M", "*", "-"]
KINDS: dict[str, str] = {"M": "Mamba-2", "*": "attention", "-": "MLP"}
CUT = "|"


def layer_kinds(pattern: str) -> list[LayerKind]:
    """The layers of a pattern in order, cuts left out. RecipeError names the first character that is none."""
    alphabet = ", ".join(f"`{sign}` {name}" for sign, name in KINDS.items())
    for place, sign in enumerate(pattern):
        if sign not in KINDS and sign != CUT:
            raise RecipeError(
                f"model.pattern={pattern}: character {place + 1} is {sign!r}. Use {alphabet}, and `|` between stages."
            )
    kinds = [cast(LayerKind, sign) for sign in pattern if sign != CUT]
    if not kinds:
        raise RecipeError(f"model.pattern={pattern!r} has no layers. Use {alphabet}.")
    if CUT in pattern and not all(pattern.split(CUT)):
        raise RecipeError(f"model.pattern={pattern} has a pipeline stage without layers. Put layers around every `|`.")
    return kinds


def cut(pattern: str, stages: int, *, model: ModelConfig) -> list[str]:
    """The pattern of each pipeline stage, first to last.

    `|` cuts are followed where the pattern has them (their number must fit) and ignored for a single stage. Without
    them the layers are cut into contiguous parts whose largest share of the matrix FLOPs is as small as possible.
    """
    layers = "".join(layer_kinds(pattern))
    if stages == 1:
        return [layers]
    if CUT in pattern:
        parts = pattern.split(CUT)
        if len(parts) != stages:
            raise RecipeError(
                f"model.pattern={pattern} is cut into {len(parts)} stages, but parallel.pipeline x "
                f"parallel.virtual_pipeline = {stages}. Use {stages - 1} `|`, or none to have it cut evenly."
            )
        return parts
    if stages > len(layers):
        raise RecipeError(
            f"parallel.pipeline x parallel.virtual_pipeline = {stages} stages, but model.pattern={pattern} has only "
            f"{len(layers)} layers. Use at most {len(layers)}."
        )
    costs = [_layer_matmul_weights(kind, model) for kind in layer_kinds(pattern)]
    return [layers[start:end] for start, end in _balanced(costs, stages)]


def _balanced(costs: list[int], parts: int) -> list[tuple[int, int]]:
    """Contiguous ranges minimising the largest sum (dynamic programme over cuts; first best choice, deterministic)."""
    total = len(costs)
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best: list[list[tuple[int, int]]] = [[(0, 0)] * (total + 1) for _ in range(parts + 1)]
    for end in range(1, total + 1):
        best[1][end] = (sums[end], 0)
    for part in range(2, parts + 1):
        for end in range(part, total + 1):
            options = [(max(best[part - 1][mid][0], sums[end] - sums[mid]), mid) for mid in range(part - 1, end)]
            best[part][end] = min(options)
    ranges = []
    end = total
    for part in range(parts, 0, -1):
        start = best[part][end][1]
        ranges.append((start, end))
        end = start
    return ranges[::-1]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model. Vocabulary unpadded."""

    embedding: int
    head: int
    """0 where the head is the embedding."""
    mamba: int
    attention: int
    mlp: int
    final_norm: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.mamba + self.attention + self.mlp + self.final_norm


def mamba_layer_parameters(model: ModelConfig) -> int:
    """One Mamba-2 layer with its pre-norm: in and out projection, convolution, A_log, D, dt_bias, gated norm."""
    inner = model.mamba_heads * model.mamba_head_dim
    conv_channels = inner + 2 * model.mamba_groups * model.mamba_state
    projections = _layer_matmul_weights("M", model)
    return projections + (model.mamba_conv + 1) * conv_channels + 3 * model.mamba_heads + inner + model.hidden


def attention_layer_parameters(model: ModelConfig) -> int:
    """One attention layer with its pre-norm; no biases."""
    return _layer_matmul_weights("*", model) + model.hidden


def mlp_layer_parameters(model: ModelConfig) -> int:
    """One MLP layer with its pre-norm; three matrices where the activation gates."""
    return _layer_matmul_weights("-", model) + model.hidden


def parameters(model: ModelConfig) -> ParameterCount:
    """Exact parameter count of a model."""
    kinds = layer_kinds(model.pattern)
    return ParameterCount(
        embedding=model.vocab * model.hidden,
        head=0 if model.tie_embeddings else model.vocab * model.hidden,
        mamba=kinds.count("M") * mamba_layer_parameters(model),
        attention=kinds.count("*") * attention_layer_parameters(model),
        mlp=kinds.count("-") * mlp_layer_parameters(model),
        final_norm=model.hidden,
    )


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of training on one token: forward and backward, no recomputation."""

    mamba_projections: float
    scan: float
    attention_projections: float
    attention_scores: float
    mlp: float
    head: float

    @property
    def total(self) -> float:
        return (
            self.mamba_projections
            + self.scan
            + self.attention_projections
            + self.attention_scores
            + self.mlp
            + self.head
        )


def flops_per_token(model: ModelConfig, sequence: int) -> Flops:
    """FLOPs per token of a model at `sequence` tokens a row.

    Convention: 6 per weight of a matrix product (2 forward, 4 backward), embedding look-up free, head counted;
    attention scores and values over the causal half; the scan as the chunked algorithm computes it (arXiv 2405.21060,
    section 6: scores within a chunk once a group, outputs, states in and out once a head), whole chunks. Norms,
    activations and the convolution are not counted.
    """
    kinds = layer_kinds(model.pattern)
    chunk = min(model.mamba_chunk, sequence)
    heads, width, state = model.mamba_heads, model.mamba_head_dim, model.mamba_state
    scan_forward = 2 * chunk * state * model.mamba_groups + 2 * chunk * width * heads + 4 * state * width * heads
    return Flops(
        mamba_projections=6 * kinds.count("M") * _layer_matmul_weights("M", model),
        scan=3 * kinds.count("M") * scan_forward,
        attention_projections=6 * kinds.count("*") * _layer_matmul_weights("*", model),
        attention_scores=6 * kinds.count("*") * sequence * model.heads * model.head_dim,
        mlp=6 * kinds.count("-") * _layer_matmul_weights("-", model),
        head=6 * model.vocab * model.hidden,
    )


def _layer_matmul_weights(kind: LayerKind, model: ModelConfig) -> int:
    match kind:
        case "M":
            inner = model.mamba_heads * model.mamba_head_dim
            fan_out = 2 * inner + 2 * model.mamba_groups * model.mamba_state + model.mamba_heads
            return model.hidden * fan_out + inner * model.hidden
        case "*":
            return 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads)
        case "-":
            return (3 if model.activation in ("swiglu", "geglu") else 2) * model.hidden * model.ffn
