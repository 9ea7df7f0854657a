"""Vocabulary-parallel cross-entropy against torch's own in float64, whole or split over two ranks, with a soft cap or without,
with padding or without."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.nn import functional as F

from train.model.cross_entropy import vocab_parallel_cross_entropy

SHAPE = (5, 3, 32)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(SHAPE, generator=g)
    return logits, torch.randint(0, SHAPE[-1], SHAPE[:2], generator=g), torch.randn(SHAPE[:2], generator=g)


def split(rank: int, world: int, cap: float | None, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    logits, labels, weights = inputs()
    padded = F.pad(logits, (0, padding), value=50.0)  # larger than every logit: they would take all of the softmax
    mine = padded.chunk(world, dim=-1)[rank].contiguous().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine * 1.0, labels, group=dist.group.WORLD, softcap=cap, padding=padding)
    (loss * weights).sum().backward()
    assert mine.grad is not None
    return loss.detach(), mine.grad


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("cap", [None, 30.0, 2.0])
def test_loss_and_gradient_equal_torchs_in_float64(world: int, cap: float | None, padding: int) -> None:
    """padding: columns that stand for no token are not in the softmax, and their gradient is exactly zero."""
    logits, labels, weights = inputs()
    exact = logits.double().requires_grad_()
    capped = exact if cap is None else cap * torch.tanh(exact / cap)
    expected = F.cross_entropy(capped.flatten(0, 1), labels.flatten(), reduction="none").view(SHAPE[:2])
    (expected * weights).sum().backward()
    results = run_ranks(world, split, world, cap, padding)
    for loss, _ in results:
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    gradient = torch.cat([grad for _, grad in results], dim=-1)
    assert not gradient[..., SHAPE[-1] :].any()
    torch.testing.assert_close(gradient[..., : SHAPE[-1]].double(), exact.grad, rtol=1e-5, atol=1e-7)
