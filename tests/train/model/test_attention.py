"""The attention core against softmax(Q K^T) V written out in float64: grouped heads, windows, soft caps, documents, a
growing cache, blocks; and the gradients of capped attention.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from train.model import flex as flex_module
from train.model.attention import AttentionCore, zigzag_positions
from train.model.capped import capped_attention
from train.model.context import KeyPlaces, KeyPool, RowContext, Segments
from train.model.documents import document_starts
from train.model.flex import flex, mask_of
from train.native import attention as compiled

WIDTH = 16
"""Of a head: fills the vectors of every processor, as the compiled form wants it."""


class OneRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def core(scale: float | None = None, *, softcap: float | None = None, window: int | None = None) -> AttentionCore:
    size = None if window is None else (window - 1, 0)
    config = SimpleNamespace(context_parallel_size=1, window_size=size, window_attn_skip_freq=None)
    groups = SimpleNamespace(cp=OneRank())
    return AttentionCore(
        config, 1, AttnMaskType.causal, "self", softmax_scale=scale, pg_collection=groups, softcap=softcap
    )


def written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | None,
    scale: float,
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    s, b, h, d = q.shape
    k, v = (t.repeat_interleave(h // t.shape[2], dim=2).double() for t in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.ones(s, s, dtype=torch.bool).tril()[None, None]
    if window is not None:
        allowed = allowed & torch.ones(s, s, dtype=torch.bool).triu(1 - window)
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v).reshape(s, b, h * d)


def qkv(sequence: int, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(sequence, 2, n, WIDTH, generator=g) for n in (heads, groups, groups))  # type: ignore[return-value]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("softcap", [None, 50.0, 0.7])
def test_output_equals_the_formula(
    heads: int, groups: int, packed: bool, window: int | None, softcap: float | None
) -> None:
    q, k, v = qkv(17, heads, groups)
    documents = (torch.arange(17) // 5).expand(2, -1) if packed else None
    context = RowContext(documents=documents) if packed else None
    got = core(softcap=softcap, window=window)(q, k, v, packed_seq_params=context)
    expected = written_out(q, k, v, documents, WIDTH**-0.5, softcap=softcap, window=window)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [3.0, None])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("length", "window", "edges"), [(300, None, ()), (300, 90, ()), (300, 200, (70, 71, 160)), (650, 560, (600,))]
)
def test_gradients_over_many_blocks(
    length: int,
    window: int | None,
    edges: tuple[int, ...],
    native: bool,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled and plain torch, in fp32, against autograd through the formula in float64."""
    if native:
        assert compiled.attention_usable(torch.zeros(WIDTH)), "these kernels could not be compiled here"
    else:
        monkeypatch.setattr(compiled, "attention_usable", lambda query: False)
    q, k, v = (t.requires_grad_() for t in qkv(length, 4, 2))
    places = torch.arange(length)
    rows = [sum((places >= edge).int() for edge in edges[row:]) + 0 * places for row in range(2)]
    documents = torch.stack(rows) if edges else None
    context = RowContext(documents=documents) if edges else None
    scale = 0.4 if softcap is not None else 2.0  # scores up to 40: their largest comes late in some lines
    got = core(scale, softcap=softcap, window=window)(q, k, v, packed_seq_params=context)
    expected = written_out(q, k, v, documents, scale, softcap=softcap, window=window)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 if softcap is None else 2e-6)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(got, (q, k, v), weights)
    exact = torch.autograd.grad(expected, (q, k, v), weights.double())
    for mine, true in zip(ours, exact, strict=True):
        assert float((mine - true).abs().max() / true.abs().max()) < 1e-5  # sums over hundreds of keys


@pytest.mark.parametrize("width", [16, 40])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 5.0), (9, 5.0)])
def test_stepwise_attention_and_its_gradients_equal_the_formula(
    window: int | None, softcap: float | None, width: int
) -> None:
    """Documents that begin anywhere, one of several pages."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(60, 2, heads, width, generator=g).requires_grad_() for heads in (4, 2, 2))
    starts = torch.zeros(2, 60, dtype=torch.int64)
    starts[0, [3, 4, 30]], starts[1, 17] = 1, 1
    documents = starts.cumsum(1)
    attention = core(0.3, softcap=softcap, window=window)
    found = attention(q, k, v, packed_seq_params=RowContext(documents=documents, is_stepwise=True))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = written_out(*exact, documents, 0.3, softcap=softcap, window=window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    weights = torch.randn(found.shape, generator=g)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), weights),
        torch.autograd.grad(expected, exact, weights.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [3.0, None])
def test_attention_gives_the_same_bits_for_any_number_of_threads(storage: torch.dtype, softcap: float | None) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.to(storage).requires_grad_() for t in qkv(500, 4, 2)]
            out = core(softcap=softcap, window=200)(*leaves)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("edges", [(), (13, 26)], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [None, 12])
def test_flex_attention_means_the_same(edges: tuple[int, ...], window: int | None) -> None:
    """The GPU's mask and score functions, run unfused by torch on a CPU."""
    q, k, v = qkv(40, 4, 2)
    places = torch.arange(40)
    index = sum(((places >= edge).int() for edge in edges), 0 * places)
    row = RowContext(documents=torch.stack([index, 0 * index])) if edges else RowContext()
    first = (places - (window or 40) + 1).clamp(min=0).expand(2, -1)
    if row.documents is not None:
        first = torch.maximum(first, document_starts(row.documents))
    first = first[:, 10:].to(torch.int32)
    mask = mask_of(
        row, queries=30, keys=40, offset=10, window=window, device=torch.device("cpu"), first_key_BQ=lambda: first
    )
    got = flex(q[10:], k, v, mask=mask, scale=0.4, softcap=2.0)
    expected = capped_attention(q[10:], k, v, first_key_BQ=first, offset=10, scale=0.4, softcap=2.0)
    torch.testing.assert_close(got, expected)
    plain = core(0.4, window=window)(q, k, v, packed_seq_params=row)
    torch.testing.assert_close(flex(q[10:], k, v, mask=mask, scale=0.4, softcap=None), plain[10:])


def test_flex_attention_is_compiled_once_and_layers_share_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of two kinds over microbatches with documents in other places, as a GPU would run them."""
    counter = CompileCounter()
    compiled_once = torch.compile(flex_attention, backend=counter)
    monkeypatch.setattr(flex_module, "fused", lambda device_type: compiled_once)
    made = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(flex_module, "create_block_mask", counted)
    flex_module._interval_mask.cache_clear()
    q, k, v = qkv(128, 4, 2)
    cpu = torch.device("cpu")
    for microbatch in range(3):
        row = RowContext(documents=(torch.arange(128) // (20 + microbatch)).expand(2, -1))
        first = document_starts(row.documents).to(torch.int32)
        for _layer in range(4):
            mask = mask_of(
                row, queries=128, keys=128, offset=0, window=None, device=cpu, first_key_BQ=lambda first=first: first
            )
            flex(q, k, v, mask=mask, scale=0.25, softcap=50.0)
    assert counter.frame_count == 1 and len(made) == 3  # one mask a microbatch
    for _ in range(3):
        for window in (None, 16):
            mask = mask_of(RowContext(), queries=128, keys=128, offset=0, window=window, device=cpu, first_key_BQ=list)  # type: ignore[arg-type]
            flex(q, k, v, mask=mask, scale=0.25, softcap=50.0)
    assert len(made) == 5 and counter.frame_count <= 3  # and one for each window, for any number of microbatches
    flex_module._interval_mask.cache_clear()


def test_documents_start_where_their_index_changes() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 4], [2, 3, 3, 3, 3, 3]])
    assert document_starts(documents).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 1, 1]]


def test_a_given_scale_is_used() -> None:
    q, k, v = qkv(9, 2, 2)
    torch.testing.assert_close(core(0.3)(q, k, v).double(), written_out(q, k, v, None, 0.3), rtol=1e-5, atol=1e-6)


PAGE = 4


def step_of(before: int, tokens: int, pool: KeyPool) -> RowContext:
    """One text, the next `tokens` tokens of it, in pages that are not in order."""
    table = torch.tensor([[3, 0, 4, 1, 2]], dtype=torch.int32)
    positions = torch.arange(before, before + tokens)
    lines = torch.tensor([[index, 1, before + index, 0] for index in range(tokens)])
    keys = KeyPlaces(table, PAGE)
    return RowContext(
        segments=Segments(
            torch.tensor([[0, tokens, before, 0]]), lines, positions, before + tokens, {"*": keys, "w": keys}, {1: pool}, {},
        )
    )  # fmt: skip


@pytest.mark.parametrize("cuts", [[17], [9, 8], [5, 1, 1, 10], [1] * 17])
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (None, 4), (2.0, None), (2.0, 4), (2.0, 1)])
def test_reading_through_pages_equals_reading_at_once(
    cuts: list[int], softcap: float | None, window: int | None
) -> None:
    q, k, v = (x[:, :1] for x in qkv(17, 4, 2))
    whole = core(softcap=softcap, window=window)(q, k, v)
    module, pool = core(softcap=softcap, window=window), KeyPool(*torch.full((2, 5, PAGE, 2, q.shape[-1]), torch.nan))
    parts, before = [], 0
    for part in zip(q.split(cuts), k.split(cuts), v.split(cuts), strict=True):
        parts.append(module(*part, packed_seq_params=step_of(before, len(part[0]), pool)))
        before += len(part[0])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zigzag_positions_share_out_the_row(ranks: int) -> None:
    parts = [zigzag_positions(32, rank=r, ranks=ranks, device=torch.device("cpu")) for r in range(ranks)]
    assert sorted(torch.cat(parts).tolist()) == list(range(32))
    # Balanced for a causal mask: every rank has the same number of (query, earlier key) pairs.
    assert len({int(part.sum()) for part in parts}) == 1
