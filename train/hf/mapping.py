"""A table of the names of our tensors in Hugging Face's files, and the conversion between them.

    pairs(model) -> [Pair]      ours: names and shapes in a checkpoint (whole model, any layout)
                                theirs: names and shapes in `*.safetensors`
    to_theirs(pair, tensors)  <-->  to_ours(pair, tensors)     exact: no arithmetic, so a round trip is bitwise

Two families: Nemotron-H (arXiv 2504.03624, Nemotron Nano 2 too) with transformers' NemotronHForCausalLM, and Gemma 2
(arXiv 2408.00118) with Gemma2ForCausalLM, or Gemma2ForSequenceClassification for a reward model. Three kinds of moves are enough
for all:

- `rows`: our tensors concatenated along rows equal theirs concatenated along rows. For projections that only one side fuses
  (Mamba's z, x, B, C, dt; the two branches of a gated MLP), and for everything that is equal on both sides.
- `groups`: Megatron stores, for each key/value head, its query heads, the key, the value; Hugging Face stores all queries,
  then all keys, then all values.
- `experts`: we store a matrix of all experts as one tensor, Hugging Face's files one tensor for each expert.

Letters of a shape: h hidden, v our vocabulary, u theirs, f ffn, q heads x head_dim, e kv_heads x head_dim, d inner width
of Mamba, n groups x state, m Mamba heads, k taps of the convolution, x experts, g width of an expert, s of the shared one, l of
the experts' inputs. `2d+2n+m` is a sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds, mtp_kinds

Shape = tuple[int, ...]
Family = Literal["nemotron_h", "gemma2"]
Move = Literal["rows", "groups", "experts"]


@dataclass(frozen=True)
class Rule:
    """One row of the table. Names are relative to the layer; in `theirs` of experts `{}` is the number of the expert."""

    ours: dict[str, str]
    theirs: dict[str, str]
    move: Move = "rows"
    pads: bool = False
    """Ours may have more rows than theirs: vocabularies rounded up for parallelism."""
    full: bool = False
    """Stays fp32 in a bf16 model (A_log, D, dt_bias: small rates need the precision)."""


@dataclass(frozen=True)
class Pair:
    """Our tensors and their tensors with the same values. Full names, exact shapes."""

    ours: dict[str, Shape]
    theirs: dict[str, Shape]
    move: Move
    pads: bool
    full: bool
    queries_per_group: int
    head_dim: int


_EMBEDDING = "embedding.word_embeddings.weight"
_MAMBA = (
    Rule({"norm.weight": "h"}, {"norm.weight": "h"}),
    Rule(
        {
            "mixer.in_proj.weight.z": "d h",
            "mixer.in_proj.weight.x": "d h",
            "mixer.in_proj.weight.B": "n h",
            "mixer.in_proj.weight.C": "n h",
            "mixer.in_proj.weight.dt": "m h",
        },
        {"mixer.in_proj.weight": "2d+2n+m h"},
    ),
    Rule(
        {"mixer.conv1d.weight.x": "d 1 k", "mixer.conv1d.weight.B": "n 1 k", "mixer.conv1d.weight.C": "n 1 k"},
        {"mixer.conv1d.weight": "d+2n 1 k"},
    ),
    Rule(
        {"mixer.conv1d.bias.x": "d", "mixer.conv1d.bias.B": "n", "mixer.conv1d.bias.C": "n"},
        {"mixer.conv1d.bias": "d+2n"},
    ),
    Rule({"mixer.dt_bias": "m"}, {"mixer.dt_bias": "m"}, full=True),
    Rule({"mixer.A_log": "m"}, {"mixer.A_log": "m"}, full=True),
    Rule({"mixer.D": "m"}, {"mixer.D": "m"}, full=True),
    Rule({"mixer.norm.weight": "d"}, {"mixer.norm.weight": "d"}),
    Rule({"mixer.out_proj.weight": "h d"}, {"mixer.out_proj.weight": "h d"}),
)


def _attention(norm: str, mixer: str) -> tuple[Rule, ...]:
    return (
        Rule({"input_layernorm.weight": "h"}, {f"{norm}.weight": "h"}),
        Rule(
            {"self_attention.linear_qkv.weight": "q+2e h"},
            {f"{mixer}.q_proj.weight": "q h", f"{mixer}.k_proj.weight": "e h", f"{mixer}.v_proj.weight": "e h"},
            move="groups",
        ),
        Rule({"self_attention.linear_proj.weight": "h q"}, {f"{mixer}.o_proj.weight": "h q"}),
    )


_NEMOTRON: dict[str, tuple[Rule, ...]] = {
    "first": (Rule({_EMBEDDING: "v h"}, {"backbone.embeddings.weight": "u h"}, pads=True),),
    "M": _MAMBA,
    "*": _attention("norm", "mixer"),
    "-": (
        Rule({"pre_mlp_layernorm.weight": "h"}, {"norm.weight": "h"}),
        Rule({"mlp.linear_fc1.weight": "f h"}, {"mixer.up_proj.weight": "f h"}),
        Rule({"mlp.linear_fc2.weight": "h f"}, {"mixer.down_proj.weight": "h f"}),
    ),
    "E": (
        Rule({"pre_mlp_layernorm.weight": "h"}, {"norm.weight": "h"}),
        Rule({"mlp.router.weight": "x h"}, {"mixer.gate.weight": "x h"}),
        Rule({"mlp.router.expert_bias": "x"}, {"mixer.gate.e_score_correction_bias": "x"}, full=True),
        Rule({"mlp.experts.linear_fc1.weight": "x g l"}, {"mixer.experts.{}.up_proj.weight": "g l"}, move="experts"),
        Rule({"mlp.experts.linear_fc2.weight": "x l g"}, {"mixer.experts.{}.down_proj.weight": "l g"}, move="experts"),
        Rule({"mlp.shared_experts.linear_fc1.weight": "s h"}, {"mixer.shared_experts.up_proj.weight": "s h"}),
        Rule({"mlp.shared_experts.linear_fc2.weight": "h s"}, {"mixer.shared_experts.down_proj.weight": "h s"}),
    ),
    "latent": (
        Rule({"mlp.latent_in.weight": "l h"}, {"mixer.fc1_latent_proj.weight": "l h"}),
        Rule({"mlp.latent_out.weight": "h l"}, {"mixer.fc2_latent_proj.weight": "h l"}),
    ),
    "depth": (
        Rule({"enorm.weight": "h"}, {"enorm.weight": "h"}),
        Rule({"hnorm.weight": "h"}, {"hnorm.weight": "h"}),
        Rule({"eh_proj.weight": "h 2h"}, {"eh_proj.weight": "h 2h"}),
    ),
    "depth norm": (Rule({"final_layernorm.weight": "h"}, {"final_layernorm.weight": "h"}),),
    "last": (
        Rule({"decoder.final_norm.weight": "h"}, {"backbone.norm_f.weight": "h"}),
        Rule({"output_layer.weight": "v h"}, {"lm_head.weight": "u h"}, pads=True),
    ),
}

_GEMMA_ATTENTION = (
    *_attention("input_layernorm", "self_attn"),
    Rule({"post_norm.weight": "h"}, {"post_attention_layernorm.weight": "h"}),
)
_GEMMA: dict[str, tuple[Rule, ...]] = {
    "first": (Rule({_EMBEDDING: "v h"}, {"model.embed_tokens.weight": "u h"}, pads=True),),
    "w": _GEMMA_ATTENTION,
    "*": _GEMMA_ATTENTION,
    "-": (
        Rule({"pre_mlp_layernorm.weight": "h"}, {"pre_feedforward_layernorm.weight": "h"}),
        Rule({"mlp.linear_fc1.weight": "2f h"}, {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h"}),
        Rule({"mlp.linear_fc2.weight": "h f"}, {"mlp.down_proj.weight": "h f"}),
        Rule({"post_norm.weight": "h"}, {"post_feedforward_layernorm.weight": "h"}),
    ),
    "last": (Rule({"decoder.final_norm.weight": "h"}, {"model.norm.weight": "h"}),),
    "scalar": (Rule({"output_layer.weight": "1 h"}, {"score.weight": "1 h"}),),
}

TABLE: dict[Family, dict[str, tuple[Rule, ...]]] = {"nemotron_h": _NEMOTRON, "gemma2": _GEMMA}


def pairs(model: ModelConfig, family: Family, *, vocab: int | None = None) -> list[Pair]:
    """Every correspondence of a model, in the order of Hugging Face's files: embedding, layers, final norm, head.

    vocab: rows of Hugging Face's embedding, if ours is padded; None: ours without padding. RecipeError if larger.
    """
    theirs_vocab = model.real_vocab if vocab is None else vocab
    if theirs_vocab > model.vocab:
        raise RecipeError(f"model.vocab={model.vocab:,} is smaller than the vocabulary of {theirs_vocab:,} to convert.")
    sizes = _sizes(model, theirs_vocab)
    table = TABLE[family]
    found = [_pair(rule, "", "", sizes=sizes, model=model) for rule in table["first"]]
    for index, kind in enumerate(layer_kinds(model.pattern)):
        ours, theirs = f"decoder.layers.{index}.", f"{layer_name(family, index)}."
        rules = table[kind] + (table["latent"] if kind == "E" and model.experts.latent else ())
        found += [_pair(rule, ours, theirs, sizes=sizes, model=model) for rule in rules]
    has_head = model.head == "vocabulary" and model.has_own_head
    last = [rule for rule in table["last"] if has_head or "output_layer.weight" not in rule.ours]
    last += table["scalar"] if model.head == "scalar" else ()
    found += [_pair(rule, "", "", sizes=sizes, model=model) for rule in last]
    found += _depths(model, table, sizes=sizes)
    if not model.has_own_head and family == "nemotron_h":  # NemotronHForCausalLM always has a separate head
        head = Rule({_EMBEDDING: "v h"}, {"lm_head.weight": "u h"}, pads=True)
        found.append(_pair(head, "", "", sizes=sizes, model=model))
    return found


def _depths(model: ModelConfig, table: Mapping[str, tuple[Rule, ...]], *, sizes: dict[str, int]) -> list[Pair]:
    """Weights of further depths, in the names of Nemotron 3 Super's files: their layers are counted through all depths, and a
    depth's norms and projection are those of its first layer, its final norm that of its last. transformers ignores them."""
    kinds, found = mtp_kinds(model), []
    for depth in range(model.mtp.sets):
        ours, first = f"mtp.layers.{depth}.", depth * len(kinds)
        found += [_pair(rule, ours, f"mtp.layers.{first}.", sizes=sizes, model=model) for rule in table["depth"]]
        for index, kind in enumerate(kinds):
            rules = table[kind] + (table["latent"] if kind == "E" and model.experts.latent else ())
            places = f"{ours}mtp_model_layer.layers.{index}.", f"mtp.layers.{first + index}."
            found += [_pair(rule, *places, sizes=sizes, model=model) for rule in rules]
        last = f"mtp.layers.{first + len(kinds) - 1}."
        found += [_pair(rule, ours, last, sizes=sizes, model=model) for rule in table["depth norm"]]
    return found


def layer_name(family: Family, index: int) -> str:
    """Name of our layer `index` in Hugging Face's model."""
    match family:
        case "nemotron_h":
            return f"backbone.layers.{index}"
        case "gemma2":  # one of their blocks is attention and MLP: two of our layers
            return f"model.layers.{index // 2}"


def to_theirs(pair: Pair, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Convert our tensors of a pair, in its order, to theirs."""
    if pair.move == "groups":
        (fused,) = tensors
        grouped = fused.unflatten(0, (-1, pair.queries_per_group + 2, pair.head_dim))
        parts = grouped.split([pair.queries_per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]
    if pair.move == "experts":
        return list(tensors[0].unbind())
    return _cut(tensors, list(pair.theirs.values()))


def to_ours(pair: Pair, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Convert their tensors of a pair, in its order, to ours.

    Rows that only our padded vocabulary has get the mean of the other rows: their logit is the mean logit, never the largest.
    """
    if pair.move == "groups":
        query, key, value = (tensor.unflatten(0, (-1, pair.head_dim)) for tensor in tensors)
        grouped = [query.unflatten(0, (-1, pair.queries_per_group)), key[:, None], value[:, None]]
        return [torch.cat(grouped, dim=1).flatten(0, 2)]
    if pair.move == "experts":
        return [torch.stack(list(tensors))]
    shapes = list(pair.ours.values())
    missing = sum(shape[0] for shape in shapes) - sum(tensor.shape[0] for tensor in tensors)
    if missing and pair.pads:
        (tensor,) = tensors
        mean = tensor.mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return [torch.cat([tensor, mean.expand(missing, -1)])]
    return _cut(tensors, shapes)


def _cut(tensors: Sequence[torch.Tensor], shapes: list[Shape]) -> list[torch.Tensor]:
    """Concatenate tensors along rows and split them by the first dims of `shapes`; surplus rows are dropped."""
    whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    rows = [shape[0] for shape in shapes]
    return list(whole[: sum(rows)].split(rows))


def _pair(rule: Rule, ours: str, theirs: str, *, sizes: dict[str, int], model: ModelConfig) -> Pair:
    return Pair(
        ours={ours + name: _shape(text, sizes) for name, text in rule.ours.items()},
        theirs={
            theirs + name.format(expert): _shape(text, sizes)
            for name, text in rule.theirs.items()
            for expert in range(sizes["x"] if rule.move == "experts" else 1)
        },
        move=rule.move,
        pads=rule.pads,
        full=rule.full,
        queries_per_group=model.heads // model.kv_heads,
        head_dim=model.head_dim,
    )


def _sizes(model: ModelConfig, theirs_vocab: int) -> dict[str, int]:
    return {
        "h": model.hidden,
        "v": model.vocab,
        "u": theirs_vocab,
        "f": model.ffn,
        "q": model.heads * model.head_dim,
        "e": model.kv_heads * model.head_dim,
        "d": model.mamba_heads * model.mamba_head_dim,
        "n": model.mamba_groups * model.mamba_state,
        "m": model.mamba_heads,
        "k": model.mamba_conv,
        "x": model.experts.count,
        "g": model.experts.ffn,
        "s": model.experts.shared_ffn,
        "l": model.experts.latent or model.hidden,
    }


def _shape(text: str, sizes: dict[str, int]) -> Shape:
    """`2d+2n+m h` as numbers."""

    def value(term: str) -> int:
        if term.isdigit():
            return int(term)
        return int(term[:-1] or 1) * sizes[term[-1]]

    return tuple(sum(value(term) for term in dim.split("+")) for dim in text.split())
