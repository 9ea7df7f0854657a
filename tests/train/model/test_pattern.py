"""Patterns, parameter counts and FLOPs against published totals and against torch's own FLOP counter."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recipes.schema.errors import RecipeError
from recipes.schema.lora import LoraConfig
from recipes.schema.model import ModelConfig
from recipes.schema.mtp import MtpConfig
from recipes.schema.pattern import (
    balanced_ranges,
    counts,
    cut,
    flops_per_token,
    layer_kinds,
    parameters,
    trained_flops_per_token,
    visible_keys,
)
from recipes.schema.typed import build

H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
H_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
H_56B = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_12B = "M-M-M-M*-" + "M-M-M-M*-" * 5 + "M-M-M-M-"
NANO_3 = "MEMEM*E" * 5 + "MEMEMEM*E" + "MEMEMEME"


def published(name: str) -> ModelConfig:
    """A published model, from its recipe group."""
    path = Path(__file__).resolve().parents[3] / "recipes" / "model" / f"{name}.yaml"
    return build(ModelConfig, yaml.safe_load(path.read_text()), "model")


MODELS = {
    "Gemma 2 2B": published("gemma2_2b"),
    "Gemma 2 9B": published("gemma2_9b"),
    "Gemma 2 27B": published("gemma2_27b"),
    "H-4B": published("nemotron_h_4b"),
    "H-8B": published("nemotron_h_8b"),
    "H-47B": published("nemotron_h_47b"),
    "H-56B": published("nemotron_h_56b"),
    "9B-v2": published("nemotron_nano_9b_v2"),
    "12B-v2": published("nemotron_nano_12b_v2"),
    "3 Nano": published("nemotron3_nano_30b_a3b"),
}
PATTERNS = {
    "H-4B": H_8B,
    "H-8B": H_8B,
    "H-47B": H_47B,
    "H-56B": H_56B,
    "9B-v2": NANO_9B,
    "12B-v2": NANO_12B,
    "3 Nano": NANO_3,
    "Gemma 2 2B": "w-*-" * 13,
    "Gemma 2 9B": "w-*-" * 21,
    "Gemma 2 27B": "w-*-" * 23,
}
# Shapes and layer counts: public Nemotron-H (arXiv 2504.03624) and Nemotron Nano 2 (arXiv 2508.14444) configurations.
# 9B-v2's total is that of its public safetensors files, to the unit; Gemma 2's are those of the public weights (vocabulary
# 256,000), and without embeddings those of table 2 in arXiv 2408.00118.
TOTALS = {
    "Gemma 2 2B": (0, 26, 26, 2_614_341_888),
    "Gemma 2 9B": (0, 42, 42, 9_241_705_984),
    "Gemma 2 27B": (0, 46, 46, 27_227_128_320),
    "H-4B": (24, 4, 24, 4_489_223_040),
    "H-8B": (24, 4, 24, 8_100_852_736),
    "H-47B": (45, 5, 48, 46_791_554_816),
    "H-56B": (54, 10, 54, 56_324_350_464),
    "9B-v2": (27, 4, 25, 8_888_227_328),
    "12B-v2": (28, 6, 28, 12_310_001_152),
    "3 Nano": (23, 6, 0, 31_577_937_344),
}
SMALL = ModelConfig(
    pattern="M-M*-M-M*-",
    hidden=256,
    vocab=4096,
    ffn=1024,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mamba_heads=8,
    mamba_head_dim=64,
    mamba_state=64,
    mamba_groups=2,
)


@pytest.mark.parametrize("name", MODELS)
def test_published_totals_to_the_unit(name: str) -> None:
    mamba, attention, mlp, total = TOTALS[name]
    layers = counts(MODELS[name].pattern)
    assert (layers["M"], layers["*"] + layers["w"], layers["-"]) == (mamba, attention, mlp)
    assert parameters(MODELS[name]).total == total
    assert MODELS[name].pattern == PATTERNS[name]


def test_published_9b_attention_places() -> None:
    places = [place for place, kind in enumerate(layer_kinds(NANO_9B)) if kind == "*"]
    assert places == [14, 21, 30, 39]


def test_nemotron_3_nano_activates_what_its_report_says() -> None:
    """arXiv 2512.20848: 31.6B parameters, 3.6B active, 3.2B of them without the embedding."""
    count = parameters(MODELS["3 Nano"])
    assert counts(NANO_3)["E"] == 23
    assert [round(n / 1e9, 1) for n in (count.total, count.active, count.active - count.embedding)] == [31.6, 3.6, 3.2]
    # One expert has two matrices of 2,688 x 1,856; 122 of 128 are idle.
    assert count.idle == 23 * 122 * 2 * 2688 * 1856


def test_nemotron_3_super_activates_what_its_report_says() -> None:
    """120.6B parameters, 12.7B active, 12.1B of them without the embedding. It does not count the routers."""
    mtp = MtpConfig(depths=2, pattern="*E", repeated=True)
    model = replace(published("nemotron3_super_120b_a12b"), mtp=mtp)
    count, layers = parameters(model), counts(model.pattern)
    assert (layers["M"], layers["E"], layers["*"]) == (40, 40, 8)
    routers = 40 * 512 * 4096
    # Of an expert layer: 512 experts of two matrices 1,024 x 2,688, the shared one, both latent projections, router, norm.
    each = 512 * 2 * 1024 * 2688 + 2 * 4096 * 5376 + 2 * 4096 * 1024 + 512 * 4096 + 4096
    assert count.experts == 40 * each and count.idle == 40 * 490 * 2 * 1024 * 2688
    attention = 2 * 4096 * 128 * (32 + 2) + 4096
    assert count.mtp == 2 * 4096 * 4096 + 3 * 4096 + attention + each
    assert count.total - count.mtp == 120_668_687_360
    found = (count.total - count.mtp, count.active, count.active - count.embedding)
    assert [round((n - routers) / 1e9, 1) for n in found] == [120.6, 12.7, 12.1]


def test_nemotron_3_ultra_has_the_size_its_report_says() -> None:
    """arXiv 2606.15007: 550B parameters, 55B active (here 55.0B without the embedding), 108 layers."""
    model = published("nemotron3_ultra_550b_a55b")
    count, layers = parameters(model), counts(model.pattern)
    assert (layers["M"], layers["E"], layers["*"]) == (48, 48, 12)
    each = 512 * 2 * 2048 * 5120 + 2 * 8192 * 10240 + 2 * 8192 * 2048 + 512 * 8192 + 8192
    assert count.experts == 48 * each
    assert round(count.total / 1e9, -1) == 550 and round((count.active - count.embedding) / 1e9) == 55


def test_parts_of_the_12b() -> None:
    count = parameters(MODELS["12B-v2"])
    assert count.mamba == 28 * 168_504_704
    assert count.attention == 6 * 62_919_680
    assert count.mlp == 28 * 209_720_320
    assert count.total - count.embedding - count.head == 10_967_823_872
    assert count.norms == 63 * 5120 + 28 * 10_240


def test_gemma_without_embeddings_as_its_paper_counts() -> None:
    table = {"Gemma 2 2B": 2_024_517_888, "Gemma 2 9B": 8_324_201_984, "Gemma 2 27B": 26_047_480_320}
    for name, total in table.items():
        count = parameters(MODELS[name])
        assert count.total - count.embedding == total and count.head == 0
        assert count.norms == (2 * len(MODELS[name].pattern) + 1) * MODELS[name].hidden


def test_a_window_saves_scores_and_nothing_else() -> None:
    model, length = MODELS["Gemma 2 9B"], 8192
    flops, everywhere = flops_per_token(model, length), flops_per_token(replace(model, window_tokens=length), length)
    seen = sum(min(place + 1, model.window_tokens) for place in range(length)) / length
    assert visible_keys(length, window=model.window_tokens) == pytest.approx(seen, rel=1 / model.window_tokens)
    assert visible_keys(length, window=length) == length / 2
    assert flops.attention_scores / everywhere.attention_scores == pytest.approx((seen + length / 2) / length, rel=1e-3)
    assert flops.total - flops.attention_scores == everywhere.total - everywhere.attention_scores


def test_gate_is_a_third_matrix_and_a_tied_head_is_free() -> None:
    mlps = SMALL.pattern.count("-")
    plain, gated = parameters(SMALL), parameters(replace(SMALL, activation="swiglu"))
    assert gated.total - plain.total == mlps * SMALL.hidden * SMALL.ffn
    assert parameters(replace(SMALL, activation="geglu")) == gated
    scored = parameters(replace(SMALL, head="scalar", tie_embeddings=True))
    assert scored.head == SMALL.hidden and plain.total - scored.total == (SMALL.vocab - 1) * SMALL.hidden
    assert plain.total - parameters(replace(SMALL, tie_embeddings=True)).total == SMALL.vocab * SMALL.hidden


def test_gemma_mlp_of_three_matrices() -> None:
    # Gemma 2 9B (arXiv 2408.00118, table 1): 3 x 3584 x 14336 weights in the MLP of a layer.
    model = ModelConfig(pattern="-", hidden=3584, vocab=8, ffn=14336, activation="geglu")
    assert parameters(model).mlp == 3 * 3584 * 14336 + 3584


def test_counts_equal_a_model_written_with_torch_modules() -> None:
    """The formula against modules that torch sizes itself."""
    model = SMALL
    inner = model.mamba_heads * model.mamba_head_dim
    conv = inner + 2 * model.mamba_groups * model.mamba_state
    head_dim = model.head_dim

    def layer(kind: str) -> list[nn.Module]:
        norm = nn.RMSNorm(model.hidden)
        match kind:
            case "M":
                scalars = nn.ParameterList([nn.Parameter(torch.zeros(model.mamba_heads)) for _ in range(3)])
                into = nn.Linear(model.hidden, inner + conv + model.mamba_heads, bias=False)
                taps = nn.Conv1d(conv, conv, model.mamba_conv, groups=conv)
                return [norm, into, taps, scalars, nn.RMSNorm(inner), nn.Linear(inner, model.hidden, bias=False)]
            case "*":
                qkv = nn.Linear(model.hidden, (model.heads + 2 * model.kv_heads) * head_dim, bias=False)
                return [norm, qkv, nn.Linear(model.heads * head_dim, model.hidden, bias=False)]
            case _:
                up = nn.Linear(model.hidden, model.ffn, bias=False)
                return [norm, up, nn.Linear(model.ffn, model.hidden, bias=False)]

    modules = [module for kind in model.pattern for module in layer(kind)]
    modules += [nn.Embedding(model.vocab, model.hidden), nn.RMSNorm(model.hidden)]
    modules += [nn.Linear(model.hidden, model.vocab, bias=False)]
    assert parameters(model).total == sum(p.numel() for module in modules for p in module.parameters())


def test_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(RecipeError, match=r"M-X\*.*character 3 is 'X'.*`M` Mamba-2.*`\*` attention.*`-` MLP"):
        layer_kinds("M-X*")


@pytest.mark.parametrize("pattern", ["", "|", "||"])
def test_pattern_without_layers(pattern: str) -> None:
    with pytest.raises(RecipeError, match="no layers"):
        layer_kinds(pattern)


@pytest.mark.parametrize("pattern", ["|M-", "M-|", "M||-"])
def test_stage_without_layers(pattern: str) -> None:
    with pytest.raises(RecipeError, match="stage without layers"):
        layer_kinds(pattern)


def test_cuts_by_hand() -> None:
    assert cut("M-M*-|M-|M*-", 3, model=SMALL) == ["M-M*-", "M-", "M*-"]
    assert cut("M-M*-|M-|M*-", 1, model=SMALL) == ["M-M*-M-M*-"]
    with pytest.raises(RecipeError, match=r"into 3 stages.*= 2.*Use 1 `\|`"):
        cut("M-M*-|M-|M*-", 2, model=SMALL)


def test_more_stages_than_layers() -> None:
    with pytest.raises(RecipeError, match=r"4 stages.*only 3 layers.*at most 3"):
        cut("M*-", 4, model=SMALL)


def test_the_head_lightens_the_last_stage() -> None:
    # A head as heavy as four MLP layers: 4 + 4 layers would be 4 : 8, six and two are 6 : 6.
    model = replace(SMALL, pattern="--------", vocab=8 * SMALL.ffn)
    assert cut(model.pattern, 2, model=model) == ["------", "--"]


@given(st.data())
def test_ranges_are_contiguous_and_best(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=9))
    parts = data.draw(st.integers(1, len(costs)))
    ranges = balanced_ranges(costs, parts)
    edges = [0, *(end for _, end in ranges)]
    assert [start for start, _ in ranges] == edges[:-1] and edges[-1] == len(costs)

    def price(cuts: tuple[int, ...]) -> tuple[int, int]:
        sums = [sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True)]
        return max(sums), sum(x * x for x in sums)

    everything = combinations(range(1, len(costs)), parts - 1)
    assert all(start < end for start, end in ranges)
    assert price(tuple(edges[1:-1])) == min(map(price, everything))


@given(st.integers(1, 52))
def test_a_cut_loses_no_layer(stages: int) -> None:
    parts = cut(H_8B, stages, model=MODELS["H-8B"])
    assert len(parts) == stages and all(parts) and "".join(parts) == H_8B


def test_12b_flops_against_the_published_convention() -> None:
    # 6 (N - V h) + 6 L h S for a token: NVIDIA's throughput tables, with L the attention layers.
    flops = flops_per_token(MODELS["12B-v2"], 8192)
    published = 6 * (12_310_001_152 - 131_072 * 5120) + 6 * 6 * 5120 * 8192
    assert published == pytest.approx(71.3e9, rel=1e-3)
    assert flops.total - flops.scan == pytest.approx(published, rel=1e-3)
    assert flops.total == sum(
        (
            flops.mamba_projections,
            flops.scan,
            flops.attention_projections,
            flops.attention_scores,
            flops.mlp,
            flops.head,
        )
    )


def test_flops_equal_torchs_count_of_the_same_products() -> None:
    """Every matrix product of a forward pass run on the meta device under torch's FLOP counter, times three."""
    model, rows, length = SMALL, 2, 256
    tokens = rows * length
    flops = flops_per_token(model, length)
    inner = model.mamba_heads * model.mamba_head_dim
    fan_out = 2 * inner + 2 * model.mamba_groups * model.mamba_state + model.mamba_heads
    chunk, state, groups, heads, width = (
        model.mamba_chunk,
        model.mamba_state,
        model.mamba_groups,
        model.mamba_heads,
        model.mamba_head_dim,
    )

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    def counted(*products: tuple[torch.Tensor, torch.Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            for left, right in products:
                torch.matmul(left, right)
        return counter.get_total_flops()

    hidden = matrix(tokens, model.hidden)
    mamba = counted((hidden, matrix(model.hidden, fan_out)), (matrix(tokens, inner), matrix(inner, model.hidden)))
    chunks = tokens // chunk
    scan = counted(
        (matrix(chunks * groups, chunk, state), matrix(chunks * groups, state, chunk)),
        (matrix(chunks * heads, chunk, chunk), matrix(chunks * heads, chunk, width)),
        (matrix(chunks * heads, state, chunk), matrix(chunks * heads, chunk, width)),
        (matrix(chunks * heads, chunk, state), matrix(chunks * heads, state, width)),
    )
    attention_width = model.heads * model.head_dim
    projections = counted(
        (hidden, matrix(model.hidden, attention_width + 2 * model.kv_heads * model.head_dim)),
        (matrix(tokens, attention_width), matrix(attention_width, model.hidden)),
    )
    full_scores = counted(
        (matrix(rows * model.heads, length, model.head_dim), matrix(rows * model.heads, model.head_dim, length)),
        (matrix(rows * model.heads, length, length), matrix(rows * model.heads, length, model.head_dim)),
    )
    mlp = counted(
        (hidden, matrix(model.hidden, model.ffn)), (matrix(tokens, model.ffn), matrix(model.ffn, model.hidden))
    )
    layers = counts(model.pattern)
    assert flops.mamba_projections * tokens == 3 * layers["M"] * mamba
    assert flops.scan * tokens == 3 * layers["M"] * scan
    assert flops.attention_projections * tokens == 3 * layers["*"] * projections
    assert flops.attention_scores * tokens == 3 * layers["*"] * full_scores / 2
    assert flops.mlp * tokens == 3 * layers["-"] * mlp
    assert flops.head * tokens == 3 * counted((hidden, matrix(model.hidden, model.vocab)))


def test_a_row_shorter_than_a_chunk_scans_one_short_chunk() -> None:
    long = replace(SMALL, mamba_chunk=256)
    assert flops_per_token(long, 64).scan == flops_per_token(replace(SMALL, mamba_chunk=64), 64).scan
    assert math.isfinite(flops_per_token(long, 1).total)


def test_flops_with_frozen_weights_are_those_that_torch_runs() -> None:
    """One MLP layer and the head, frozen, with adapters of the layer's linears: forward and backward."""
    tokens, hidden, ffn, vocab, rank = 8, 16, 32, 64, 4
    model = ModelConfig(
        pattern="-", hidden=hidden, ffn=ffn, vocab=vocab, activation="relu2", lora=LoraConfig(rank=rank)
    )

    def adapted(x: torch.Tensor, into: int, out: int) -> torch.Tensor:
        down, up = torch.ones(rank, into, requires_grad=True), torch.ones(out, rank, requires_grad=True)
        return x @ torch.ones(into, out) + x @ down.T @ up.T

    with FlopCounterMode(display=False) as counter:
        hidden_TD = torch.ones(tokens, hidden, requires_grad=True)  # the embedding's output
        out_TD = adapted(adapted(hidden_TD, hidden, ffn).relu().square(), ffn, hidden)
        (out_TD @ torch.ones(hidden, vocab)).sum().backward()
    assert trained_flops_per_token(model, tokens) * tokens == counter.get_total_flops()
