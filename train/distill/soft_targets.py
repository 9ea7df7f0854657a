"""The output head's loss against a teacher's distribution: a few tokens at a time, the vocabulary split over ranks.

    hidden states --head, chunk by chunk--> student's logits --+
                                                               +--> loss per token, gradients of hidden and weight
    teacher's hidden states --its head--> teacher's logits ----+

Logits are the largest tensors of a language model (8,192 tokens x 256,000 words in fp32: 8 GiB, twice, for the two
models). Here they exist for one chunk of tokens: its loss and its gradient are computed while they are there, so that
nothing is computed twice and the backward pass only multiplies by what comes from above (the loss is a sum, so that is
one number). Each tensor rank holds its slice of the vocabulary of both models; a softmax over all of it needs two numbers
a token from every other rank.

With student's logits z, teacher's distribution p, q = softmax(z / T), and soft cap c where the model has one:

    divergence = T^2 sum p (log p - log q)        its gradient for z: T (q - p)        z = c tanh(u / c): times 1 - (z/c)^2

The square keeps gradients the size they have at T = 1 (Hinton, arXiv 1503.02531, section 2.1). `TopK` targets hold the
teacher's k most likely tokens and the mass r of the rest: the divergence is that of these k + 1 outcomes, a lower bound of
the whole one (it lacks r KL(p_rest || q_rest)), and pulls nowhere within the rest.

Shapes: N tokens of a chunk or of all, H hidden, V vocabulary of this rank, K kept tokens.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from train.native.gemm import multiply

CPU_CHUNK_BYTES = 2 << 20
"""Logits of one chunk on a CPU: they stay in a core's cache (measured, docs/log.md)."""
GPU_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Head:
    """An output head on this tensor rank."""

    weight_VH: torch.Tensor
    """Rows of this rank's slice of the vocabulary; slices in rank order, all of one size."""
    softcap: float | None = None


@dataclass(frozen=True)
class LossWeights:
    """What a token's loss is made of."""

    divergence: float = 1.0
    next_token: float = 0.0
    temperature: float = 1.0
    is_cross_entropy: bool = False
    """Report the teacher's cross-entropy instead of the divergence: larger by the teacher's entropy, same gradient."""


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely tokens, of `N` tokens."""

    ids_NK: torch.Tensor
    """int64, ids in the whole vocabulary, most likely first."""
    log_p_NK: torch.Tensor
    """Their log-probabilities in the whole distribution (at the temperature of the loss)."""
    rest_N: torch.Tensor
    """Probability of all other tokens together."""

    def __getitem__(self, tokens: slice) -> "TopK":
        return TopK(self.ids_NK[tokens], self.log_p_NK[tokens], self.rest_N[tokens])


class Targets(Protocol):
    """Where a chunk's teacher distribution comes from."""

    def logits(self, tokens: slice, *, temperature: float) -> torch.Tensor | None:
        """Teacher's logits over this rank's slice, divided by the temperature, [n, V]; None where only top-k is known."""

    def kept(self, tokens: slice, log_p_NV: torch.Tensor | None, *, group: dist.ProcessGroup) -> TopK | None:
        """The k most likely tokens; None where the whole distribution counts. Collective over `group`."""


@dataclass(frozen=True)
class OnlineTargets:
    """A teacher's final hidden states and its head, cut like the student's."""

    hidden_NH: torch.Tensor
    head: Head
    top_k: int = 0
    """0: the whole distribution."""

    def logits(self, tokens: slice, *, temperature: float) -> torch.Tensor:
        return capped_logits(self.hidden_NH[tokens], self.head).div_(temperature)

    def kept(self, tokens: slice, log_p_NV: torch.Tensor | None, *, group: dist.ProcessGroup) -> TopK | None:
        if not self.top_k:
            return None
        assert log_p_NV is not None
        return top_k_of(log_p_NV, self.top_k, group=group)


@dataclass(frozen=True)
class KeptTargets:
    """Top-k targets from a file."""

    kept_N: TopK

    def logits(self, tokens: slice, *, temperature: float) -> None:
        return None

    def kept(self, tokens: slice, log_p_NV: torch.Tensor | None, *, group: dist.ProcessGroup) -> TopK:
        return self.kept_N[tokens]


@dataclass(frozen=True)
class HeadLosses:
    """Losses of a microbatch's tokens on this rank (all tensor ranks hold the same)."""

    total: torch.Tensor
    """Weighted sum over tokens, differentiable once in hidden states and head weight."""
    divergence_N: torch.Tensor
    next_token_N: torch.Tensor


def head_losses(
    hidden_NH: torch.Tensor,
    head: Head,
    *,
    targets: Targets,
    labels_N: torch.Tensor,
    weights: LossWeights,
    group: dist.ProcessGroup,
    chunk_tokens: int = 0,
) -> HeadLosses:
    """Loss of the student's head against teacher and labels; see the module text.

    hidden_NH: the student's hidden states, whole on every tensor rank; their gradient is this rank's part (add it up over
    the group). labels_N: ids in the whole vocabulary. chunk_tokens: 0 chooses. Collective over `group` in the forward
    pass. Arithmetic is fp32 (float64 for float64 inputs); on a GPU, products of bf16 weights are bf16.
    """
    if not chunk_tokens:
        budget = CPU_CHUNK_BYTES if hidden_NH.device.type == "cpu" else GPU_CHUNK_BYTES
        chunk_tokens = max(16, budget // (4 * head.weight_VH.shape[0]))
    problem = _Problem(head.softcap, targets, labels_N, weights, group, chunk_tokens)
    needs_gradient = torch.is_grad_enabled() and (hidden_NH.requires_grad or head.weight_VH.requires_grad)
    total, divergence, next_token = _HeadLoss.apply(hidden_NH, head.weight_VH, problem, needs_gradient)
    return HeadLosses(total, divergence, next_token)


@dataclass(frozen=True)
class _Problem:
    softcap: float | None
    targets: Targets
    labels_N: torch.Tensor
    weights: LossWeights
    group: dist.ProcessGroup
    chunk_tokens: int


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, problem: _Problem, needs_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        work = _work_dtype(hidden_NH)
        tokens = hidden_NH.shape[0]
        weights = problem.weights
        multiplied = _as_multiplied(weight_VH)
        divergence_N = torch.empty(tokens, dtype=work, device=hidden_NH.device)
        at_label_N = torch.empty_like(divergence_N)
        grad_hidden = torch.empty_like(hidden_NH) if needs_gradient else None
        grad_weight = torch.zeros(weight_VH.shape, dtype=work, device=weight_VH.device) if needs_gradient else None
        for start in range(0, tokens, problem.chunk_tokens):
            part = slice(start, min(start + problem.chunk_tokens, tokens))
            hidden = _as_multiplied(hidden_NH[part])
            z = _logits(hidden, multiplied, problem.softcap)
            gradient, divergence_N[part], at_label_N[part] = _chunk(z, part, problem, needs_gradient)
            if gradient is not None and grad_hidden is not None and grad_weight is not None:
                if problem.softcap is not None:
                    gradient.mul_(1 - (z / problem.softcap).square_())
                gradient = gradient.to(hidden.dtype)
                grad_hidden[part] = multiply(gradient, multiplied)
                grad_weight += multiply(gradient.t(), hidden)
        if problem.group.size() > 1:  # what every slice knew of its own part of the sums
            both = torch.stack([divergence_N, at_label_N])
            dist.all_reduce(both, group=problem.group)
            divergence_N, at_label_N = both
        next_token_N = -at_label_N
        total = (weights.divergence * divergence_N + weights.next_token * next_token_N).sum()
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight_VH.dtype
        ctx.mark_non_differentiable(divergence_N, next_token_N)
        return total, divergence_N, next_token_N

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_unused: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            (grad_hidden * grad).to(grad_hidden.dtype) if ctx.needs_input_grad[0] else None,
            grad_weight.mul_(grad).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _chunk(
    z_NV: torch.Tensor, part: slice, problem: _Problem, needs_gradient: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradient for the logits z, and this slice's part of the divergence and of the label's log-probability, per token."""
    weights, group, T = problem.weights, problem.group, problem.weights.temperature
    scaled = z_NV if T == 1 else z_NV / T
    teacher = problem.targets.logits(part, temperature=T)
    stack = [scaled] if teacher is None else [scaled, teacher.to(z_NV.dtype)]
    if T != 1:
        stack.append(z_NV)
    logs = log_softmax_over_ranks(stack, group=group)
    log_q, log_q_plain = logs[0], logs[-1] if T != 1 else logs[0]
    log_p = logs[1] if teacher is not None else None

    labels, is_here = _local(problem.labels_N[part], z_NV.shape[1], group)
    at_label = log_q_plain.gather(1, labels.unsqueeze(1)).squeeze(1) * is_here
    kept = problem.targets.kept(part, log_p, group=group)
    if kept is not None:
        gradient, divergence = _top_k_divergence(log_q, kept, group=group, report_entropy=weights.is_cross_entropy)
    else:
        assert log_p is not None
        gradient, divergence = _divergence(log_q, log_p, is_cross_entropy=weights.is_cross_entropy)
    divergence = divergence * T**2
    if not needs_gradient:
        return None, divergence, at_label
    gradient.mul_(T * weights.divergence)
    if weights.next_token:
        softmax = log_q_plain.exp()
        softmax.scatter_add_(1, labels.unsqueeze(1), -is_here.unsqueeze(1).to(softmax.dtype))
        gradient.add_(softmax, alpha=weights.next_token)
    return gradient, divergence, at_label


def _divergence(
    log_q: torch.Tensor, log_p: torch.Tensor, *, is_cross_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q - p, this slice's sum of p (log p - log q) or -p log q). Overwrites `log_p`."""
    difference = log_q.neg() if is_cross_entropy else log_p - log_q
    p = log_p.exp_()
    divergence = difference.mul_(p).sum(1)
    return torch.exp(log_q, out=difference).sub_(p), divergence


def _top_k_divergence(
    log_q: torch.Tensor, kept: TopK, *, group: dist.ProcessGroup, report_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of k + 1 outcomes. The rest's gradient is its excess mass, spread as the student spreads it."""
    ids, is_here = _local(kept.ids_NK, log_q.shape[1], group)
    log_p = kept.log_p_NK.to(log_q.dtype)
    rest_p = kept.rest_N.to(log_q.dtype)
    p = log_p.exp() * is_here
    log_q_K = log_q.gather(1, ids)
    q = log_q.exp()
    q_K = q.gather(1, ids) * is_here
    rest = q.scatter_add_(1, ids, -q_K)  # exactly zero at the kept tokens
    rest_q = rest.sum(1)
    if group.size() > 1:
        dist.all_reduce(rest_q, group=group)
    rest_q = rest_q.clamp_min(torch.finfo(rest_q.dtype).tiny)
    of_rest = -rest_p * torch.log(rest_q)
    of_kept = -p * log_q_K
    if not report_entropy:
        of_rest = of_rest + torch.xlogy(rest_p, rest_p)
        of_kept = of_kept + p * log_p
    divergence = of_kept.sum(1) + of_rest / group.size()  # every rank knows all of the rest's term
    gradient = rest.mul_((1 - rest_p / rest_q).unsqueeze(1))
    return gradient.scatter_add_(1, ids, q_K - p), divergence


def log_softmax_over_ranks(logits: list[torch.Tensor], *, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """log-softmax over the whole vocabulary of several [N, V] slices. Collective over `group`, once for all of them."""
    logs = [torch.log_softmax(z, dim=1) for z in logits]
    if group.size() == 1:
        return logs
    # A slice's log-sum-exp in two parts that are exact: its largest logit, and the log of the sum below it (at least 0).
    mine = []
    for z, log in zip(logits, logs, strict=True):
        largest, where = z.max(dim=1)
        mine += [largest, -log.gather(1, where.unsqueeze(1)).squeeze(1)]
    parts = torch.stack(mine)
    everyones = torch.empty(group.size() * len(mine), len(parts[0]), dtype=parts.dtype, device=parts.device)
    dist.all_gather_into_tensor(everyones, parts, group=group)
    everyones = everyones.view(group.size(), *parts.shape)
    for index, log in enumerate(logs):
        largest, sums = everyones[:, 2 * index], everyones[:, 2 * index + 1]
        relative = (largest - parts[2 * index]) + (sums - parts[2 * index + 1])
        log -= torch.logsumexp(relative, dim=0).unsqueeze(1)
    return logs


def top_k_of(log_p_NV: torch.Tensor, k: int, *, group: dist.ProcessGroup) -> TopK:
    """The k most likely tokens of distributions cut over `group`. Collective; ties go to the lower rank."""
    slice_size = log_p_NV.shape[1]
    log_p, ids = log_p_NV.topk(min(k, slice_size), dim=1)
    if group.size() > 1:
        ids = ids + group.rank() * slice_size
        all_log_p = [torch.empty_like(log_p) for _ in range(group.size())]
        all_ids = [torch.empty_like(ids) for _ in range(group.size())]
        dist.all_gather(all_log_p, log_p.contiguous(), group=group)
        dist.all_gather(all_ids, ids.contiguous(), group=group)
        log_p, place = torch.cat(all_log_p, dim=1).topk(min(k, slice_size * group.size()), dim=1)
        ids = torch.cat(all_ids, dim=1).gather(1, place)
    rest = (1 - log_p.double().exp().sum(1)).clamp_min(0).to(log_p.dtype)
    return TopK(ids, log_p, rest)


def _local(ids: torch.Tensor, slice_size: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids within this rank's slice, 0 where they are elsewhere; whether they are here)."""
    local = ids - group.rank() * slice_size
    is_here = (local >= 0) & (local < slice_size)
    return torch.where(is_here, local, 0), is_here


def _work_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as_multiplied(x: torch.Tensor) -> torch.Tensor:
    """A matrix as it enters products: bf16 stays bf16 on a GPU; a CPU multiplies it 50 times faster in fp32."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def capped_logits(hidden_NH: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits of a head over this rank's slice, [N, V]. fp32 (float64 for float64 inputs)."""
    return _logits(hidden_NH, head.weight_VH, head.softcap)


def _logits(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits of a head over its slice, in the dtype of the arithmetic, soft-capped where the model does it."""
    product = multiply(_as_multiplied(hidden_NH), _as_multiplied(weight_VH).t())
    z = product.to(_work_dtype(product))
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)
