"""The attention core against softmax(Q K^T) V written out in float64: grouped heads, documents, and a growing cache."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from train.model.attention import AttentionCore, zigzag_positions
from train.model.context import LayerCaches, RowContext


class OneRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def core(scale: float | None = None) -> AttentionCore:
    config = SimpleNamespace(context_parallel_size=1)
    groups = SimpleNamespace(cp=OneRank())
    return AttentionCore(config, 1, AttnMaskType.causal, "self", softmax_scale=scale, pg_collection=groups)


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, scale: float
) -> torch.Tensor:
    s, b, h, d = q.shape
    k, v = (t.repeat_interleave(h // t.shape[2], dim=2).double() for t in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q.double(), k) * scale
    allowed = torch.ones(s, s, dtype=torch.bool).tril()[None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v).reshape(s, b, h * d)


def qkv(sequence: int, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(sequence, 2, n, 8, generator=g) for n in (heads, groups, groups))  # type: ignore[return-value]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_output_equals_the_formula(heads: int, groups: int, packed: bool) -> None:
    q, k, v = qkv(17, heads, groups)
    documents = (torch.arange(17) // 5).expand(2, -1) if packed else None
    context = RowContext(documents=documents) if packed else None
    got = core()(q, k, v, packed_seq_params=context)
    torch.testing.assert_close(got.double(), written_out(q, k, v, documents, 8**-0.5), rtol=1e-5, atol=1e-6)


def test_a_given_scale_is_used() -> None:
    q, k, v = qkv(9, 2, 2)
    torch.testing.assert_close(core(0.3)(q, k, v).double(), written_out(q, k, v, None, 0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuts", [[17], [9, 8], [5, 1, 1, 10], [1] * 17])
def test_reading_through_a_cache_equals_reading_at_once(cuts: list[int]) -> None:
    q, k, v = qkv(17, 4, 2)
    whole = core()(q, k, v)
    module, context = core(), RowContext(caches=LayerCaches())
    parts = [
        module(*part, packed_seq_params=context)
        for part in zip(q.split(cuts), k.split(cuts), v.split(cuts), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zigzag_positions_share_out_the_row(ranks: int) -> None:
    parts = [zigzag_positions(32, rank=r, ranks=ranks, device=torch.device("cpu")) for r in range(ranks)]
    assert sorted(torch.cat(parts).tolist()) == list(range(32))
    # Balanced for a causal mask: every rank has the same number of (query, earlier key) pairs.
    assert len({int(part.sum()) for part in parts}) == 1
