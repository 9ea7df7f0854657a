"""Vocabulary-parallel cross-entropy against torch's own in float64, whole or split over two ranks, with a soft cap or without,
with padding or without; and its log-sum-exp, as in a z-loss."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.nn import functional as F

from train.model.cross_entropy import cross_entropy_and_log_sums, vocab_parallel_cross_entropy

SHAPE = (5, 3, 32)
Z = 0.03
"""Coefficient of the z-loss: large, so that it matters."""


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(SHAPE, generator=g)
    return logits, torch.randint(0, SHAPE[-1], SHAPE[:2], generator=g), torch.randn(SHAPE[:2], generator=g)


def split(rank: int, world: int, cap: float | None, padding: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    logits, labels, weights = inputs()
    padded = F.pad(logits, (0, padding), value=50.0)  # larger than every logit: they would take all of the softmax
    found = []
    for z in (0.0, Z):
        mine = padded.chunk(world, dim=-1)[rank].contiguous().requires_grad_()
        options = {"group": dist.group.WORLD, "softcap": cap, "padding": padding}
        if z:
            losses, log_sums = cross_entropy_and_log_sums(mine * 1.0, labels, **options)
            losses = losses + z * log_sums**2
        else:
            losses = vocab_parallel_cross_entropy(mine * 1.0, labels, **options)
        (losses * weights).sum().backward()
        assert mine.grad is not None
        found.append((losses.detach(), mine.grad))
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("cap", [None, 30.0, 2.0])
def test_loss_and_gradient_equal_torchs_in_float64(world: int, cap: float | None, padding: int) -> None:
    """padding: columns that stand for no token are not in the softmax, and their gradient is exactly zero."""
    logits, labels, weights = inputs()
    ranks = run_ranks(world, split, world, cap, padding)
    for z, results in zip((0.0, Z), zip(*ranks, strict=True), strict=True):
        exact = logits.double().requires_grad_()
        capped = exact if cap is None else cap * torch.tanh(exact / cap)
        expected = F.cross_entropy(capped.flatten(0, 1), labels.flatten(), reduction="none").view(SHAPE[:2])
        expected = expected + z * capped.logsumexp(-1) ** 2
        (expected * weights).sum().backward()
        for loss, _ in results:
            torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        gradient = torch.cat([grad for _, grad in results], dim=-1)
        assert not gradient[..., SHAPE[-1] :].any()
        torch.testing.assert_close(gradient[..., : SHAPE[-1]].double(), exact.grad, rtol=1e-5, atol=2e-7)
