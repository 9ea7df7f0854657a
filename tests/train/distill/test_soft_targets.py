"""The head's loss against a teacher: whole and split over two and four ranks, equal to plain formulas in float64."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.nn import functional as F

from recipes.schema.model import ModelConfig
from train.distill.soft_targets import (
    CachedTargets,
    Head,
    LossWeights,
    OnlineTargets,
    head_losses,
    log_softmax_over_ranks,
    top_k_of,
)

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 37, 64, 12, 20
CAP = 5.0
CASES = {
    "kl": (LossWeights(), None, 0),
    "cross-entropy": (LossWeights(is_cross_entropy=True), None, 0),
    "temperature, mixed": (LossWeights(divergence=0.7, next_token=0.3, temperature=2.5), None, 0),
    "soft caps": (LossWeights(next_token=0.5), CAP, 0),
    "top 5": (LossWeights(divergence=0.9, next_token=0.2), None, 5),
    "top 5, soft caps, temperature": (LossWeights(temperature=1.7), CAP, 5),
    "top 24, more than a rank of four has, cross-entropy, low temperature": (
        LossWeights(divergence=0.6, next_token=0.4, temperature=0.5, is_cross_entropy=True),
        None,
        24,
    ),
}


@dataclasses.dataclass
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor


def inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    # Logits of about +-10: peaked distributions, as trained models have.
    return Inputs(
        normal(TOKENS, HIDDEN).to(dtype),
        (1.5 * normal(VOCAB, HIDDEN)).to(dtype),
        normal(TOKENS, TEACHER_HIDDEN).to(dtype),
        normal(VOCAB, TEACHER_HIDDEN).to(dtype),
        torch.randint(0, VOCAB, (TOKENS,), generator=g),
    )


def exact(weights: LossWeights, cap: float | None, top_k: int) -> tuple[torch.Tensor, ...]:
    """(divergence, next token, gradient of hidden, gradient of weight) by the textbook formulas, in float64."""
    x = inputs()
    hidden, weight = x.hidden.double().requires_grad_(), x.weight.double().requires_grad_()
    z = hidden @ weight.t()
    t = x.teacher_hidden.double() @ x.teacher_weight.double().t()
    if cap is not None:
        z, t = cap * torch.tanh(z / cap), cap * torch.tanh(t / cap)
    log_q, log_p = (F.log_softmax(y / weights.temperature, dim=1) for y in (z, t))
    if top_k:
        ids = log_p.topk(top_k, dim=1).indices
        rest = torch.ones_like(log_p).scatter(1, ids, 0.0)

        def outcomes(log: torch.Tensor) -> torch.Tensor:
            return torch.cat([log.gather(1, ids), (log.exp() * rest).sum(1, keepdim=True).log()], dim=1)

        log_q, log_p = outcomes(log_q), outcomes(log_p)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1)
    if weights.is_cross_entropy:
        divergence = -(log_p.exp() * log_q).sum(1)
    divergence = divergence * weights.temperature**2
    next_token = F.cross_entropy(z, x.labels, reduction="none")
    (weights.divergence * divergence + weights.next_token * next_token).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return divergence.detach(), next_token.detach(), hidden.grad, weight.grad


def ours(
    rank: int,
    world: int,
    dtype: torch.dtype,
    weights: LossWeights,
    cap: float | None,
    top_k: int,
    kept: bool,
    padding: int,
) -> tuple[torch.Tensor, ...]:
    """The same on one of `world` ranks, each with its slice of both vocabularies, 8 tokens at a time.

    padding: rows that stand for no token, with large weights that would change everything.
    """
    x = inputs(dtype)
    x.weight, x.teacher_weight = (F.pad(w, (0, 0, 0, padding), value=9.0) for w in (x.weight, x.teacher_weight))
    shape = ModelConfig("-", hidden=HIDDEN, vocab=VOCAB + padding, vocab_padding=padding, logit_softcap=cap)
    hidden = x.hidden.clone().requires_grad_()
    weight = x.weight.chunk(world)[rank].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    teacher = Head.of(x.teacher_weight.chunk(world)[rank], shape, group=group)
    targets: OnlineTargets | CachedTargets = OnlineTargets(x.teacher_hidden, teacher, top_k)
    if kept:
        logits = OnlineTargets(x.teacher_hidden, teacher).logits(slice(None), temperature=weights.temperature)
        (log_p,) = log_softmax_over_ranks([logits], group=group)
        targets = CachedTargets(top_k_of(log_p, top_k, slice_size=teacher.slice_size, group=group))
    losses = head_losses(
        hidden,
        Head.of(weight, shape, group=group),
        targets=targets,
        labels_N=x.labels,
        weights=weights,
        group=group,
        chunk_tokens=8,
    )
    (3 * losses.total).backward()
    assert hidden.grad is not None and weight.grad is not None
    dist.all_reduce(hidden.grad)
    return losses.total.detach(), losses.divergence_N, losses.next_token_N, hidden.grad / 3, weight.grad / 3


def all_cases(
    rank: int, world: int, dtype: torch.dtype = torch.float32, padding: int = 0
) -> dict[str, tuple[torch.Tensor, ...]]:
    results = {}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for name, (weights, cap, top_k) in CASES.items():
        for kept in [False, True] if top_k else [False]:
            result = ours(rank, world, dtype, weights, cap, top_k, kept, padding)
            results[f"{name}{' from a file' if kept else ''}"] = result
    dist.destroy_process_group()
    return results


@pytest.mark.parametrize(("world", "padding"), [(1, 0), (2, 0), (4, 0), (1, 8), (4, 8)])
def test_losses_and_gradients_equal_the_textbook_in_float64(world: int, padding: int) -> None:
    ranks = run_ranks(world, all_cases, world, torch.float32, padding)
    for name in ranks[0]:
        weights, cap, top_k = CASES[name.removesuffix(" from a file")]
        divergence, next_token, grad_hidden, grad_weight = exact(weights, cap, top_k)
        total = (weights.divergence * divergence + weights.next_token * next_token).sum()
        for result in (rank[name] for rank in ranks):
            torch.testing.assert_close(result[0].double(), total, rtol=1e-6, atol=1e-6, msg=name)
            torch.testing.assert_close(result[1].double(), divergence, rtol=1e-6, atol=1e-6, msg=name)
            torch.testing.assert_close(result[2].double(), next_token, rtol=1e-6, atol=1e-6, msg=name)
            torch.testing.assert_close(result[3].double(), grad_hidden, rtol=1e-5, atol=1e-5, msg=name)
        gradient = torch.cat([rank[name][4] for rank in ranks])
        assert not gradient[VOCAB:].any()
        torch.testing.assert_close(gradient[:VOCAB].double(), grad_weight, rtol=1e-5, atol=1e-5, msg=name)


def test_float64_inputs_are_exact_to_ten_digits() -> None:
    (results,) = run_ranks(1, all_cases, 1, torch.float64)
    for name, result in results.items():
        weights, cap, top_k = CASES[name.removesuffix(" from a file")]
        _, _, grad_hidden, grad_weight = exact(weights, cap, top_k)
        torch.testing.assert_close(result[3], grad_hidden, rtol=1e-10, atol=1e-10, msg=name)
        torch.testing.assert_close(result[4], grad_weight, rtol=1e-10, atol=1e-10, msg=name)


def test_top_k_divergence_never_exceeds_the_whole_and_reaches_it() -> None:
    """Merging outcomes cannot raise a KL divergence (data-processing inequality)."""
    whole = exact(LossWeights(), None, 0)[0]
    kept = [exact(LossWeights(), None, k)[0] for k in (1, 4, 16, VOCAB - 1)]
    for smaller, larger in zip(kept, [*kept[1:], whole], strict=True):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(kept[-1], whole, rtol=0, atol=1e-9)


def test_a_teacher_equal_to_the_student_gives_zero_loss_and_zero_gradient() -> None:
    (result,) = run_ranks(1, itself)
    assert result[0] < 1e-6 and result[1] < 1e-5


def itself(rank: int) -> tuple[float, float]:
    dist.init_process_group("gloo", rank=rank, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    x = inputs()
    hidden = x.hidden.clone().requires_grad_()
    head = Head(x.weight, VOCAB)
    losses = head_losses(
        hidden, head, targets=OnlineTargets(x.hidden, head), labels_N=x.labels, weights=LossWeights(), group=group
    )
    losses.total.backward()
    assert hidden.grad is not None
    return float(losses.divergence_N.abs().max()), float(hidden.grad.abs().max())
