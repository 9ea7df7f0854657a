"""The layer pattern of a hybrid model, and what can be computed from it: stages, parameter counts, FLOPs.

A pattern such as `M-M*-M-M*-` has one character per residual layer: `M` Mamba-2, `*` attention, `w` attention over a window of
earlier tokens, `-` MLP, `E` mixture of experts. `|` sets a cut between pipeline stages.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Literal, cast

from recipes.schema.encoders import encoder_weights
from recipes.schema.errors import Problem, refuse
from recipes.schema.lora import adapted_linears
from recipes.schema.model import ModelConfig

LayerKind = Literal["M", "*", "w", "-", "E"]
KINDS: dict[str, str] = {
    "M": "Mamba-2",
    "*": "attention",
    "w": "attention over a window",
    "-": "MLP",
    "E": "mixture of experts",
}
GATED = ("swiglu", "geglu")
"""Activations with two branches, and so two matrices before them."""
ATTENTION: tuple[LayerKind, ...] = ("*", "w")
"""The kinds of attention. They have the same parameters and different masks."""
CUT = "|"


def layer_kinds(pattern: str) -> list[LayerKind]:
    """The layers of a pattern in order, without cuts. RecipeError names the first character that is not a layer."""
    refuse(pattern_problems(pattern))
    return [cast(LayerKind, sign) for sign in pattern if sign != CUT]


def kinds_of(model: ModelConfig) -> set[LayerKind]:
    """The kinds of layers that a model has, those of its further depths included."""
    return set(layer_kinds(model.pattern)) | set(mtp_kinds(model))


def mtp_kinds(model: ModelConfig) -> list[LayerKind]:
    """The layers of one further depth, in order; [] without multi-token prediction."""
    return layer_kinds(model.mtp.pattern) if model.mtp.depths else []


def mtp_problems(model: ModelConfig) -> list[Problem]:
    """Why the depths of `model.mtp` cannot be built."""
    mtp, key = model.mtp, "model.mtp.pattern"
    if not mtp.depths:
        return []
    if CUT in mtp.pattern:
        text = f"{key}={mtp.pattern} has a `|`, but all depths are on the last pipeline stage."
        return [Problem(key, text, f"Use {key}={mtp.pattern.replace(CUT, '') or '*-'}.")]
    if wrong := pattern_problems(mtp.pattern):
        return [Problem(key, wrong[0].text.replace("model.pattern", key), wrong[0].remedy)]
    if model.head == "scalar":
        text = f"model.mtp.depths={mtp.depths} predicts tokens, but model.head=scalar predicts none."
        return [Problem("model.mtp.depths", text, "Use model.mtp.depths=0.")]
    return []


def pattern_problems(pattern: str) -> list[Problem]:
    """The first reason why a text is not a pattern of layers."""
    key, alphabet = "model.pattern", ", ".join(f"`{sign}` {name}" for sign, name in KINDS.items())
    main, *depths = pattern.split("/")
    if depths and len(set(depths)) == 1 and set(main) <= {*KINDS, CUT} and set(depths[0]) <= set(KINDS):
        text = f"model.pattern={pattern} names the depths of multi-token prediction, as Megatron writes them."
        remedy = f"Use model.pattern={main} model.mtp.pattern={depths[0]} model.mtp.depths={len(depths)}."
        return [Problem(key, text, remedy)]
    for place, sign in enumerate(pattern):
        if sign not in KINDS and sign != CUT:
            text = f"model.pattern={pattern}: character {place + 1} is {sign!r}."
            return [Problem(key, text, f"Use {alphabet}, and `|` between stages.")]
    if not pattern.replace(CUT, ""):
        return [Problem(key, f"model.pattern={pattern!r} has no layers.", f"Use {alphabet}.")]
    if not all(pattern.split(CUT)):
        text = f"model.pattern={pattern} has a pipeline stage without layers."
        return [Problem(key, text, "Put layers around every `|`.")]
    return []


def counts(pattern: str) -> dict[LayerKind, int]:
    """Number of layers of each kind. All kinds are keys."""
    kinds = layer_kinds(pattern)
    return {kind: kinds.count(kind) for kind in ("M", "*", "w", "-", "E")}


def cut(pattern: str, stages: int, *, model: ModelConfig) -> list[str]:
    """The pattern of each pipeline stage, first to last (with virtual stages: of each model chunk, in layer order).

    If the pattern has `|`, it is cut there: as often as there are stages, or not at all for a single stage. Without `|`, the
    layers are cut into contiguous parts so that the largest share of the forward FLOPs in matrix products is as small as
    possible, where the head and further depths count with the last part. Of the cuts that reach this, the most even one is used.
    """
    refuse([*pattern_problems(pattern), *cut_problems(pattern, stages)])
    kinds = layer_kinds(pattern)
    layers = "".join(kinds)
    if stages == 1:
        return [layers]
    if CUT in pattern:
        return pattern.split(CUT)
    costs = [layer_matmul_weights(kind, model) for kind in kinds]
    head = model.head_rows * model.hidden
    depth = mtp_projection_weights(model) + sum(layer_matmul_weights(kind, model) for kind in mtp_kinds(model)) + head
    costs[-1] += head + model.mtp.depths * depth
    return [layers[start:end] for start, end in balanced_ranges(costs, stages)]


def cut_problems(pattern: str, stages: int) -> list[Problem]:
    """Why a valid pattern cannot be cut into this number of stages."""
    layers, parts = len(pattern.replace(CUT, "")), pattern.split(CUT)
    if stages == 1:
        return []
    if len(parts) > 1 and len(parts) != stages:
        text = (
            f"model.pattern={pattern} is cut into {len(parts)} stages, but parallel.pipeline x "
            f"parallel.virtual_pipeline = {stages}."
        )
        return [Problem("model.pattern", text, f"Use {stages - 1} `|`, or none for an even cut.")]
    if stages > layers:
        text = (
            f"parallel.pipeline x parallel.virtual_pipeline = {stages} stages, but model.pattern={pattern} has only "
            f"{layers} layers."
        )
        return [Problem("parallel.pipeline", text, f"Use at most {layers}.")]
    return []


def balanced_ranges(costs: list[int], parts: int) -> list[tuple[int, int]]:
    """Cut a list into `parts` non-empty contiguous ranges [start, end) so that the largest sum is as small as possible.

    Of several such cuts, the one with the smallest sum of squared sums, then the earliest. The result is always the same.
    """
    assert 1 <= parts <= len(costs), f"{len(costs)} costs cannot be cut into {parts} non-empty parts"
    return list(_balanced(tuple(costs), parts))


@lru_cache(maxsize=1024)
def _balanced(costs: tuple[int, ...], parts: int) -> tuple[tuple[int, int], ...]:
    sums = list(accumulate(costs, initial=0))
    largest, _ = _cheapest(sums, parts, join=max, cost_of=lambda cost: cost)
    _, ranges = _cheapest(
        sums, parts, join=lambda a, b: a + b, cost_of=lambda cost: cost * cost if cost <= largest else math.inf
    )
    return tuple(ranges)


def _cheapest(
    sums: list[int],
    parts: int,
    *,
    join: Callable[[float, float], float],
    cost_of: Callable[[int], float],
) -> tuple[float, list[tuple[int, int]]]:
    """(cost, ranges) of the cheapest cut of a list, by dynamic programming. sums: its running sums.

    join(cost of the earlier parts, cost of one more part) must be monotone.
    """
    size = len(sums) - 1
    best = [[(math.inf, 0)] * (size + 1) for _ in range(parts + 1)]
    for end in range(1, size + 1):
        best[1][end] = (cost_of(sums[end]), 0)
    for part in range(2, parts + 1):
        for end in range(part, size + 1):
            found = (math.inf, part - 1)
            for middle in range(end - 1, part - 2, -1):
                last = cost_of(sums[end] - sums[middle])
                if last > found[0]:
                    break  # even longer last parts cost even more
                found = min(found, (join(best[part - 1][middle][0], last), middle))
            best[part][end] = found
    ranges: list[tuple[int, int]] = []
    end = size
    for part in range(parts, 0, -1):
        start = best[part][end][1]
        ranges.insert(0, (start, end))
        end = start
    return best[parts][size][0], ranges


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model. `mamba`, `attention` (with or without a window) and `mlp` count all layers of that kind."""

    embedding: int
    head: int
    """0 if the head is the embedding."""
    mamba: int
    attention: int
    mlp: int
    experts: int
    """All `E` layers: every routed expert, shared experts, routers, latent projections, norms."""
    idle: int
    """Routed experts of `E` layers beyond the `top_k` that process a token."""
    final_norm: int
    mtp: int
    """Multi-token prediction: all sets of weights of its depths. The fields above are those of the model without it."""
    adapters: int
    """Low-rank adapters (`model.lora`); with any, no other parameter is trained."""
    encoders: int
    """Encoders of images and audio with their projectors."""
    norms: int
    """All RMSNorm weights: each layer's pre- and post-norm, the gated norms of Mamba-2, the final norm, and those of further
    depths. The fields above include them."""

    @property
    def total(self) -> int:
        """Every parameter once."""
        layers = self.mamba + self.attention + self.mlp + self.experts
        return self.embedding + self.head + layers + self.final_norm + self.mtp + self.encoders + self.adapters

    @property
    def trained(self) -> int:
        """Parameters that training changes."""
        return self.adapters or self.total

    @property
    def active(self) -> int:
        """Parameters that take part in predicting a token of text: not further depths, not encoders."""
        return self.total - self.idle - self.mtp - self.encoders


def mamba_layer_parameters(model: ModelConfig) -> int:
    """One Mamba-2 layer with its norms: in and out projection, convolution, A_log, D, dt_bias, gated norm."""
    inner = model.mamba_heads * model.mamba_head_dim
    conv_channels = inner + 2 * model.mamba_groups * model.mamba_state
    projections = layer_matmul_weights("M", model)
    return projections + (model.mamba_conv + 1) * conv_channels + 3 * model.mamba_heads + inner + layer_norms(model)


def attention_layer_parameters(model: ModelConfig) -> int:
    """One attention layer with its norms. There are no biases."""
    return layer_matmul_weights("*", model) + _norm_weights("*", model)


def mlp_layer_parameters(model: ModelConfig) -> int:
    """One MLP layer with its norms. A gated activation has three matrices."""
    return layer_matmul_weights("-", model) + layer_norms(model)


def expert_parameters(model: ModelConfig) -> int:
    """One routed expert."""
    experts = model.experts
    return _matrices(model) * (experts.latent or model.hidden) * experts.ffn


def expert_layer_parameters(model: ModelConfig) -> int:
    """One `E` layer with its norms. The bias that balances experts is not a parameter."""
    idle = (model.experts.count - model.experts.top_k) * expert_parameters(model)
    return layer_matmul_weights("E", model) + idle + layer_norms(model)


def _matrices(model: ModelConfig) -> int:
    return 3 if model.activation in GATED else 2


def layer_norms(model: ModelConfig) -> int:
    """Weights of the norms around a layer: one before it, and with `post_norms` one after it."""
    return (2 if model.post_norms else 1) * model.hidden


def parameters(model: ModelConfig) -> ParameterCount:
    """Exact parameter count of a model (Nemotron-H, arXiv 2504.03624; Mamba-2, arXiv 2405.21060; Gemma 2, arXiv 2408.00118)."""
    layers = counts(model.pattern)
    depth = [0, 0]  # parameters and norms of one further depth
    if mtp_kinds(model):
        sizes = {
            "M": mamba_layer_parameters, "*": attention_layer_parameters, "w": attention_layer_parameters,
            "-": mlp_layer_parameters, "E": expert_layer_parameters,
        }  # fmt: skip
        depth[1] = 3 * model.hidden + sum(_norm_weights(kind, model) for kind in mtp_kinds(model))
        depth[0] = mtp_projection_weights(model) + 3 * model.hidden + sum(sizes[k](model) for k in mtp_kinds(model))
    norms = sum(count * _norm_weights(kind, model) for kind, count in layers.items()) + model.hidden
    return ParameterCount(
        embedding=model.vocab * model.hidden,
        head=model.head_rows * model.hidden if model.has_own_head else 0,
        mamba=layers["M"] * mamba_layer_parameters(model),
        attention=(layers["*"] + layers["w"]) * attention_layer_parameters(model),
        mlp=layers["-"] * mlp_layer_parameters(model),
        experts=layers["E"] * expert_layer_parameters(model),
        idle=layers["E"] * (model.experts.count - model.experts.top_k) * expert_parameters(model),
        final_norm=model.hidden,
        mtp=model.mtp.sets * depth[0],
        adapters=sum(map(sum, adapter_sizes(model).values())),
        encoders=sum(one.numel for one in encoder_weights(model.vision, model.audio, model.hidden).values()),
        norms=norms + model.mtp.sets * depth[1],
    )


def adapter_sizes(model: ModelConfig) -> dict[int, list[int]]:
    """Parameters of the adapters (`model.lora`) of each layer that has any: rank x (inputs + outputs) of each linear."""
    inner, attention = model.mamba_heads * model.mamba_head_dim, model.heads * model.head_dim
    gates = 2 if model.activation in GATED else 1
    ends = {
        "mixer.in_proj": model.hidden + 2 * inner + 2 * model.mamba_groups * model.mamba_state + model.mamba_heads,
        "mixer.out_proj": inner + model.hidden,
        "self_attention.linear_qkv": model.hidden + attention + 2 * model.kv_heads * model.head_dim,
        "self_attention.linear_proj": attention + model.hidden,
        "mlp.linear_fc1": model.hidden + gates * model.ffn,
        "mlp.linear_fc2": model.ffn + model.hidden,
    }
    linears = adapted_linears(model.lora, layer_kinds(model.pattern))
    return {index: [model.lora.rank * ends[name] for name in names] for index, names in linears.items()}


def mtp_projection_weights(model: ModelConfig) -> int:
    """The projection of a further depth, from embedding and hidden state to a hidden state."""
    return 2 * model.hidden * model.hidden


def _norm_weights(kind: LayerKind, model: ModelConfig) -> int:
    """Weights of all norms of a layer; a Mamba-2 layer also has a gated one, attention may have those of queries and keys."""
    inside = model.mamba_heads * model.mamba_head_dim if kind == "M" else 0
    return layer_norms(model) + (2 * model.head_dim if model.qk_norm and kind in ATTENTION else inside)


def weights_of(model: ModelConfig) -> dict[str, object]:
    """Everything that names and shapes of weights depend on. Models with equal values can load each other's weights."""
    kinds = kinds_of(model)
    names = ["hidden", "vocab", "head", "post_norms"]
    names += ["tie_embeddings"] * (model.head == "vocabulary")
    names += ["heads", "kv_heads", "head_dim", "qk_norm"] * bool(kinds & set(ATTENTION))
    names += ["mamba_heads", "mamba_head_dim", "mamba_state", "mamba_groups", "mamba_conv"] * ("M" in kinds)
    found = {f"model.{name}": getattr(model, name) for name in names}
    found["model.pattern"] = _without_windows(layer_kinds(model.pattern))
    if model.mtp.depths:
        found |= {
            "model.mtp.pattern": _without_windows(mtp_kinds(model)),
            "sets of weights of model.mtp": model.mtp.sets,
        }
    for name in ("vision", "audio"):
        if getattr(model, name).layers:
            found |= {f"model.{name}": getattr(model, name)}
    if "-" in kinds:
        found |= {"model.ffn": model.ffn}
    if "E" in kinds:
        names = ["count", "ffn", "shared_ffn", "latent"]
        found |= {f"model.experts.{name}": getattr(model.experts, name) for name in names}
        found |= {"balanced by a bias": model.experts.bias_rate > 0}
    if model.lora.rank:
        found |= {"model.lora.rank": model.lora.rank}
        found |= {"linears with an adapter": adapted_linears(model.lora, layer_kinds(model.pattern))}
    if {"-", "E"} & kinds:
        found |= {"gated MLP": model.activation in GATED}
    return found


def _without_windows(kinds: list[LayerKind]) -> str:
    """A pattern in which all attention layers are alike: windows have no weights."""
    return "".join("*" if kind in ATTENTION else kind for kind in kinds)


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of training on one token: forward and backward, without recomputation."""

    mamba_projections: float
    scan: float
    attention_projections: float
    attention_scores: float
    mlp: float
    experts: float
    """Active experts, router and latent projections."""
    head: float
    mtp: float
    """Further depths: their projections, layers and passes of the head."""

    @property
    def total(self) -> float:
        """The sum: the numerator of MFU."""
        return (
            self.mamba_projections
            + self.scan
            + self.attention_projections
            + self.attention_scores
            + self.mlp
            + self.experts
            + self.head
            + self.mtp
        )


def flops_per_token(model: ModelConfig, sequence: int) -> Flops:
    """Training FLOPs per token of a model with rows of `sequence` tokens.

    Convention: a multiply-add is 2 FLOPs, and the backward pass is twice the forward pass. So each weight of a matrix product
    costs 6. The embedding look-up is free; the head counts. Attention scores and values cost, in the forward pass, 2 products
    x 2 FLOPs x keys x heads x head_dim, where `visible_keys` is the mean number of keys. Soft caps, rotations, norms and gates
    are elementwise work and not counted.

    The scan is counted as the chunked algorithm computes it (arXiv 2405.21060, section 6), for whole chunks of Q tokens. In the
    forward pass, per token, with G groups, H heads of P channels and N states: scores C B^T once per group, 2 Q N G; scores
    times inputs, 2 Q P H; the state after each chunk, B^T x, 2 N P H; the contribution of the state before it, C state,
    2 N P H. Elementwise work is not counted: states passed from chunk to chunk (2 N P H / Q), decays, norms, activations, the
    convolution.
    """
    further = 0.0
    if kinds := mtp_kinds(model):
        one = _layer_flops(Counter(kinds), model, sequence)
        further = model.mtp.depths * (one.total + 6 * mtp_projection_weights(model))
    return replace(_layer_flops(Counter(layer_kinds(model.pattern)), model, sequence), mtp=further)


def trained_flops_per_token(model: ModelConfig, sequence: int) -> float:
    """Training FLOPs per token of a run. With adapters, a frozen weight needs no gradient: it costs 4 instead of 6.
    Each weight of an adapter costs 6."""
    flops = flops_per_token(model, sequence)
    if not model.lora.rank:
        return flops.total
    frozen = flops.mamba_projections + flops.attention_projections + flops.mlp + flops.experts + flops.head
    return flops.total - frozen / 3 + 6 * parameters(model).adapters


def _layer_flops(number: Counter[LayerKind], model: ModelConfig, sequence: int) -> Flops:
    """Of some layers, by kind, and the head."""
    chunk = min(model.mamba_chunk, sequence)
    inner = model.mamba_heads * model.mamba_head_dim
    scan_forward = (
        2 * chunk * model.mamba_state * model.mamba_groups + 2 * chunk * inner + 4 * model.mamba_state * inner
    )
    attention_layers = number["*"] + number["w"]
    keys = number["*"] * visible_keys(sequence) + number["w"] * visible_keys(sequence, window=model.window_tokens)
    return Flops(
        mamba_projections=6 * number["M"] * layer_matmul_weights("M", model),
        scan=3 * number["M"] * scan_forward,
        attention_projections=6 * attention_layers * layer_matmul_weights("*", model),
        attention_scores=3 * 4 * keys * model.heads * model.head_dim,
        mlp=6 * number["-"] * layer_matmul_weights("-", model),
        experts=6 * number["E"] * layer_matmul_weights("E", model),
        head=6 * model.head_rows * model.hidden,
        mtp=0.0,
    )


def visible_keys(sequence: int, *, window: int | None = None) -> float:
    """Mean number of keys that a token attends to in a row of S tokens: S/2 (causal), or W - W^2 / 2S within a window W."""
    if window is None or window >= sequence:
        return sequence / 2
    return window - window * window / (2 * sequence)


def layer_matmul_weights(kind: LayerKind, model: ModelConfig) -> int:
    """Number of a layer's weights in one token's matrix products. Each costs 2 FLOPs per token in the forward pass. Of an `E`
    layer: the router, `top_k` experts, the shared one, latent projections."""
    match kind:
        case "M":
            inner = model.mamba_heads * model.mamba_head_dim
            fan_out = 2 * inner + 2 * model.mamba_groups * model.mamba_state + model.mamba_heads
            return model.hidden * fan_out + inner * model.hidden
        case "*" | "w":
            return 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads)
        case "-":
            return _matrices(model) * model.hidden * model.ffn
        case "E":
            experts = model.experts
            shared = _matrices(model) * model.hidden * experts.shared_ffn
            around = model.hidden * (experts.count + 2 * experts.latent)
            return experts.top_k * expert_parameters(model) + shared + around
