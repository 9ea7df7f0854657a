"""Steps of one new token per text: compiled parts equal their definitions, in fp32 and bf16, and a text has the same bits in any
batch."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import GEMMA, VOCAB, engine_of, recipe_with
from torch.nn import functional as F

from launch.plan.cost.inference import cache_sizes
from train.inference.forward import Read, logits_of, read_tokens
from train.inference.pools import Pools
from train.model import paged, ssd
from train.model.activation import activate
from train.model.context import KeyPool, MambaPool, Segments
from train.model.few_tokens import FewTokens
from train.model.norm import rms_norm
from train.model.paged import paged_attention
from train.model.rotary import _rotate
from train.native import attention as compiled_attention
from train.native import scan as compiled_scan
from train.native.few_rows import FewRows, NormWeight, line_sums
from train.native.scan import ScanSizes, ScanWeights


def tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "gated"), [(None, False), ("squared_relu", False), ("gelu", True), ("silu", False)]
)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 40, 22), (7, 64, 50), (20, 33, 6), (18, 1300, 40)])
def test_a_linear_layer_for_few_rows_equals_its_parts(
    rows: int, inputs: int, outputs: int, function: Any, gated: bool, dtype: torch.dtype
) -> None:
    x, weight = tensor(rows, inputs, seed=0, dtype=dtype), tensor(outputs, inputs, seed=1, dtype=dtype)
    before = NormWeight(tensor(inputs, seed=2, dtype=dtype), 1e-5, 1.0)
    width = outputs // 2 if gated else outputs
    after = NormWeight(tensor(width, seed=3, dtype=dtype), 1e-6)
    residual = tensor(rows, width, seed=4, dtype=dtype)
    found = FewRows(weight, norm=before, function=function, gated=gated, post=after)(x, residual)
    y = F.linear(rms_norm(x, before.weight, eps=1e-5, offset=1.0).double(), weight.double()).to(dtype)
    y = activate(y, function, gated) if function else y
    expected = residual + rms_norm(y, after.weight, eps=1e-6)
    relative, absolute = (2e-5, 2e-5) if dtype == torch.float32 else (2e-2, 4e-2)
    torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)


def test_a_row_has_the_same_bits_alone_and_with_others() -> None:
    layer = FewRows(tensor(37, 100, seed=0), norm=NormWeight(tensor(100, seed=1), 1e-5, groups=4))
    x = tensor(23, 100, seed=2)
    whole = layer(x)
    for rows in (1, 2, 3, 5, 8, 22):
        assert torch.equal(layer(x[:rows]), whole[:rows])


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 600, 70), (3, 257, 16), (13, 512, 33), (40, 300, 130)])
def test_sums_over_several_parts_of_inputs_and_panels_of_outputs(rows: int, inputs: int, outputs: int) -> None:
    x, weight = tensor(rows, inputs, seed=0), tensor(outputs, inputs, seed=1)
    layer = FewRows(weight)
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    weight *= 2  # the layer has a copy
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    layer.pack()
    torch.testing.assert_close(layer(x), 2 * expected, rtol=1e-5, atol=1e-4)


def test_a_soft_cap_in_the_product_gives_fp32() -> None:
    x, weight = tensor(3, 64, seed=0, dtype=torch.bfloat16), tensor(40, 64, seed=1, dtype=torch.bfloat16)
    product = F.linear(x.double(), weight.double()).to(torch.bfloat16).float()
    found = FewRows(weight, softcap=3.0, wide=True)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 3 * torch.tanh(product / 3), rtol=1e-2, atol=1e-2)


def test_likeliest_tokens_and_log_sums_equal_torch() -> None:
    logits = tensor(9, 75, seed=0) * 20
    logits[1, 5:60] = -torch.inf
    logits[2, [7, 40]] = 90.0  # the first of equals
    best, log_sums = line_sums(logits)
    assert torch.equal(best, logits.argmax(-1)) and best[2] == 7
    torch.testing.assert_close(log_sums, logits.double().logsumexp(-1).float(), rtol=1e-6, atol=1e-6)
    logits[3, 74], logits[4, 0], logits[5] = torch.nan, torch.inf, -torch.inf
    _, log_sums = line_sums(logits)
    assert torch.isfinite(log_sums).tolist() == [line not in (3, 4, 5) for line in range(9)]


def segments_of(texts: list[tuple[int, int, int]], places: dict[str, Any] | None = None) -> Segments:
    """(tokens, before, slot) of each text."""
    begin, lines, by_token = 0, [], []
    for tokens, before, slot in texts:
        lines.append((begin, tokens, before, slot))
        by_token += [(begin + index, 1, before + index, slot) for index in range(tokens)]
        begin += tokens
    each = torch.tensor(by_token)
    return Segments(torch.tensor(lines), each, each[:, 2], int(each[:, 2].max()) + 1, places or {}, {}, {})


@pytest.mark.parametrize("texts", [[(1, 5, 2), (1, 0, 0)], [(1, 3, 1), (7, 0, 3), (40, 9, 0)], [(2, 1, 1), (3, 2, 2)]])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_scan_of_a_step_equals_its_definition(
    texts: list[tuple[int, int, int]], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, P, N, G, taps = 8, 16, 16, 2, 4
    channels, total = heads * P + 2 * G * N, sum(tokens for tokens, _, _ in texts)
    weights = ScanWeights(
        conv_weight_CW=tensor(channels, taps, seed=0), conv_bias_C=tensor(channels, seed=1), dt_bias_H=tensor(heads, seed=2),
        A_log_H=tensor(heads, seed=3), D_H=tensor(heads, seed=4),
    )  # fmt: skip
    sizes = ScanSizes(heads=heads, head_dim=P, state=N, groups=G, chunk=16)
    segments = segments_of(texts)
    zxbcdt = tensor(total, heads * P + channels + heads, seed=5)
    pools = [
        MambaPool(tensor(4, taps - 1, channels, seed=6), tensor(4, heads, N, P, seed=7), torch.empty(0))
        for _ in range(2)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = ssd.mamba_core_segments(zxbcdt, weights, sizes=sizes, segments=segments, pool=pools[0])
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(compiled_scan, "scan_usable", lambda *_: False)
    expected = ssd.mamba_core_segments(zxbcdt, weights, sizes=sizes, segments=segments, pool=pools[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    for a, b in [(pools[0].conv, pools[1].conv), (pools[0].scan, pools[1].scan)]:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "softcap", "turns"), [(None, None, False), (6, 5.0, True), (1, None, True), (50, 2.0, False)]
)
def test_compiled_attention_over_pages_equals_its_definition(
    window: int | None, softcap: float | None, turns: bool, dtype: torch.dtype
) -> None:
    heads, groups, width, page = 6, 2, 16, 4
    texts = segments_of([(1, 0, 1), (1, 18, 0), (1, 39, 2)])
    table = torch.randperm(30, generator=torch.Generator().manual_seed(0)).view(3, 10).to(torch.int32)
    qkv = tensor(3, groups, heads // groups + 2, width, seed=1, dtype=dtype)
    pool = KeyPool(
        tensor(30, page, groups, width, seed=2, dtype=dtype), tensor(30, page, groups, width, seed=3, dtype=dtype)
    )
    angles = tensor(40, width // 2, seed=4)
    cosine, sine = angles.cos(), angles.sin()
    other = KeyPool(pool.keys.clone(), pool.values.clone())
    found = compiled_attention.paged_step(
        qkv.flatten(1), (cosine, sine) if turns else None, table, texts.table, pool.keys, pool.values, heads=heads, window=window,
        scale=0.3, softcap=softcap,
    )  # fmt: skip
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    if turns:
        at = texts.positions_T
        q, k = (_rotate(x, cosine[at, None], sine[at, None]) for x in (q, k))
    for line, segment in enumerate(texts.segments):
        where = (int(table[segment.slot, segment.before // page]), segment.before % page)
        other.keys[where], other.values[where] = k[line], v[line]
    expected = paged_attention(q, other, table, texts.segments, window=window, scale=0.3, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pool.values, other.values)
    torch.testing.assert_close(pool.keys, other.keys, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, 5.0), (1, None), (300, 2.0), (200, None)])
@pytest.mark.parametrize("page", [4, 48])
def test_attention_of_parts_over_pages_equals_float64(
    window: int | None, softcap: float | None, dtype: torch.dtype, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled and in torch, in several blocks of keys. Pages that no query sees contain NaN."""
    heads, groups, width, slots = 6, 2, 16, 5
    texts = segments_of([(1, 402, 1), (1, 0, 3), (90, 0, 0), (47, 333, 4), (3, 5, 2)])
    total = -(-404 // page)
    table = torch.randperm(slots * total, generator=torch.Generator().manual_seed(0)).view(slots, total).to(torch.int32)
    pool = KeyPool(*(tensor(slots * total, page, groups, width, seed=s, dtype=dtype) for s in (2, 3)))
    q = tensor(len(texts.positions_T), heads, width, seed=1)
    expected = []
    for segment in texts.segments:
        end = segment.before + segment.tokens
        first_seen = max(0, segment.before - (window or end) + 1)
        gone = torch.cat([table[segment.slot, : first_seen // page], table[segment.slot, -(-end // page) :]]).long()
        pool.keys[gone], pool.values[gone] = torch.nan, torch.nan
        k, v = (x[table[segment.slot].long()].flatten(0, 1)[:end].double() for x in (pool.keys, pool.values))
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[segment.begin : segment.begin + segment.tokens].double(), k) * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        places, own = torch.arange(end), torch.arange(segment.before, end)[:, None]
        seen = (places <= own) & (places > own - (window or end))
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, v.masked_fill(v.isnan(), 0)).flatten(1))
    ways = {"window": window, "scale": 0.3, "softcap": softcap}
    found = compiled_attention.paged_parts(q, table, texts.table, pool.keys, pool.values, **ways)
    torch.testing.assert_close(found, torch.cat(expected).float(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(paged, "BLOCK_TOKENS", 96)
    found = paged_attention(q, pool, table, texts.segments, **ways)
    torch.testing.assert_close(found, torch.cat(expected).float(), rtol=1e-4, atol=1e-5)


def steps_both_ways(rank: int, changes: dict[str, Any]) -> list[tuple[float, float]]:
    """Differences of logits, divided by their spread, between the layers called one by one and the prepared ones."""
    recipe = recipe_with(**changes)
    found = []
    with engine_of(recipe, rank=rank, world=1) as built, torch.no_grad():
        model, shape = built.chunks[0].module.eval(), recipe.model
        few, dtype = FewTokens(model), next(model.parameters()).dtype
        assert few.layers and not any(layer.__qualname__.startswith("_as_it_is") for layer in few.layers)
        sizes = cache_sizes(shape, rows=3, context_tokens=40, page_tokens=4, step_tokens=9, number_bytes=dtype.itemsize)
        pools = [Pools(shape, sizes, dtype=dtype, device=torch.device("cpu")) for _ in range(2)]
        draw = torch.Generator().manual_seed(1)
        for position in range(24):
            reads = [Read(row, torch.randint(0, VOCAB, (1,), generator=draw).tolist(), position) for row in range(3)]
            results = []
            for pool, prepared in zip(pools, (None, few), strict=True):
                for read in reads:
                    pool.extend(read.row, position + 1)
                results.append(logits_of(model, read_tokens(model, reads, pool, few=prepared), few=prepared))
                for read in reads:
                    pool.slide(read.row, position + 1)
            found.append((float((results[0] - results[1]).abs().max()), float(results[0].std())))
    return found


ROTARY = {"model.position": "rope", "model.activation": "swiglu"}


@pytest.mark.parametrize("changes", [{}, ROTARY, GEMMA], ids=["hybrid", "rotary", "gemma"])
def test_prepared_layers_equal_the_layers(changes: dict[str, Any]) -> None:
    found = run_ranks(1, steps_both_ways, changes)[0]
    assert max(error / spread for error, spread in found) < 2e-5


def test_prepared_layers_equal_the_layers_in_bf16() -> None:
    found = run_ranks(1, steps_both_ways, {"precision.params": "bf16"})[0]
    assert max(error / spread for error, spread in found) < 0.1  # a few roundings of 2^-8 that fall the other way
