"""The loss of the output head against a teacher's distribution, in chunks of tokens, with a vocabulary split over ranks.

    hidden states --head, chunk by chunk--> student's logits --+
                                                               +--> loss per token, gradients of hidden and weight
    teacher's hidden states --its head--> teacher's logits ----+

Logits are the largest tensors of a language model (8,192 tokens x 256,000 words in fp32: 8 GiB for each of the two
models). Here they exist for one chunk of tokens at a time. Loss and gradient of a chunk are computed together, so nothing
is computed twice, and the backward pass only multiplies by the incoming gradient (one number, because the loss is a sum).
Each tensor rank holds its slice of the vocabulary of both models. A softmax over the whole vocabulary needs two numbers
per token from every other rank.

With student logits z, teacher distribution p, q = softmax(z / T), and soft cap c if the model has one:

    divergence = T^2 sum p (log p - log q)        its gradient for z: T (q - p)        z = c tanh(u / c): times 1 - (z/c)^2

The factor T^2 keeps gradients at the size they have at T = 1 (Hinton, arXiv 1503.02531, section 2.1). `TopK` targets hold
the teacher's k most likely tokens and the mass r of the rest. Their divergence is that of k + 1 outcomes: a lower bound of
the full one (the term r KL(p_rest || q_rest) is missing), with no gradient that changes proportions within the rest.

Shapes: N tokens of a chunk or of all chunks, H hidden, V tokens of this rank's slice of the vocabulary, K top-k tokens.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from recipes.schema.model import ModelConfig
from train.model.head import token_rows
from train.native.gemm import multiply

CPU_CHUNK_BYTES = 2 << 20
"""Bytes of logits of one chunk on a CPU, so that they stay in a core's cache (measured, docs/log.md)."""
GPU_CHUNK_BYTES = 256 << 20
"""Bytes of logits of one chunk on a GPU."""


@dataclass(frozen=True)
class Head:
    """An output head on this tensor rank."""

    weight_VH: torch.Tensor
    """The rows of this rank's slice of the vocabulary that stand for tokens."""
    slice_size: int
    """Rows of each rank's slice, in rank order. The last rank's weight may have fewer (`model.vocab_padding`)."""
    softcap: float | None = None

    @classmethod
    def of(cls, weight_VH: torch.Tensor, model: ModelConfig, *, group: dist.ProcessGroup) -> "Head":
        """A model's head from this rank's slice of its weight, padding included."""
        slice_size = weight_VH.shape[0]
        real = token_rows(slice_size, model.vocab_padding, group)
        weight = weight_VH if real == slice_size else weight_VH[:real]
        return cls(weight, slice_size, softcap=model.logit_softcap)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of a token's loss."""

    divergence: float = 1.0
    next_token: float = 0.0
    temperature: float = 1.0
    is_cross_entropy: bool = False
    """Report cross-entropy with the teacher instead of the divergence: larger by the teacher's entropy, same gradient."""


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely next tokens at `N` positions."""

    ids_NK: torch.Tensor
    """int64 ids in the whole vocabulary, most likely first."""
    log_p_NK: torch.Tensor
    """Their log-probabilities in the full distribution, at the temperature of the loss."""
    rest_N: torch.Tensor
    """Total probability of all other tokens."""

    def __getitem__(self, tokens: slice) -> "TopK":
        return TopK(self.ids_NK[tokens], self.log_p_NK[tokens], self.rest_N[tokens])


class Targets(Protocol):
    """Source of the teacher distribution of a chunk of tokens."""

    def logits(self, tokens: slice, *, temperature: float) -> torch.Tensor | None:
        """Teacher logits over this rank's slice, divided by the temperature, [n, V]; None if only the top k is known."""

    def most_likely(self, tokens: slice, log_p_NV: torch.Tensor | None, *, group: dist.ProcessGroup) -> TopK | None:
        """The k most likely tokens; None if the full distribution is used. Collective over `group`."""


@dataclass(frozen=True)
class OnlineTargets:
    """Targets from a teacher's final hidden states and its head, which is split like the student's."""

    hidden_NH: torch.Tensor
    head: Head
    top_k: int = 0
    """0: the full distribution."""

    def logits(self, tokens: slice, *, temperature: float) -> torch.Tensor:
        return capped_logits(self.hidden_NH[tokens], self.head).div_(temperature)

    def most_likely(self, tokens: slice, log_p_NV: torch.Tensor | None, *, group: dist.ProcessGroup) -> TopK | None:
        if not self.top_k:
            return None
        assert log_p_NV is not None
        return top_k_of(log_p_NV, self.top_k, slice_size=self.head.slice_size, group=group)


@dataclass(frozen=True)
class CachedTargets:
    """Top-k targets read from a teacher cache."""

    top_k_N: TopK

    def logits(self, tokens: slice, *, temperature: float) -> None:
        return None

    def most_likely(self, tokens: slice, log_p_NV: torch.Tensor | None, *, group: dist.ProcessGroup) -> TopK:
        return self.top_k_N[tokens]


@dataclass(frozen=True)
class HeadLosses:
    """Losses of the tokens of a microbatch, equal on all tensor ranks."""

    total: torch.Tensor
    """Weighted sum over tokens. Hidden states and head weight get a gradient, but only once (no second derivative)."""
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
    """Loss of the student's head against teacher and labels; see the module docstring.

    hidden_NH: the student's hidden states, complete on every tensor rank. Their gradient is this rank's part: the caller
    sums it over the group. labels_N: ids in the whole vocabulary. chunk_tokens: 0 chooses a size. Collective over `group`
    in the forward pass. Arithmetic is fp32 (float64 for float64 inputs); on a GPU, products of bf16 weights are bf16.
    """
    if not chunk_tokens:
        budget = CPU_CHUNK_BYTES if hidden_NH.device.type == "cpu" else GPU_CHUNK_BYTES
        chunk_tokens = max(16, budget // (4 * head.weight_VH.shape[0]))
    problem = _Problem(head.softcap, head.slice_size, targets, labels_N, weights, group, chunk_tokens)
    needs_gradient = torch.is_grad_enabled() and (hidden_NH.requires_grad or head.weight_VH.requires_grad)
    total, divergence, next_token = _HeadLoss.apply(hidden_NH, head.weight_VH, problem, needs_gradient)
    return HeadLosses(total, divergence, next_token)


@dataclass(frozen=True)
class _Problem:
    softcap: float | None
    slice_size: int
    targets: Targets
    labels_N: torch.Tensor
    weights: LossWeights
    group: dist.ProcessGroup
    chunk_tokens: int


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits of a chunk exist; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, problem: _Problem, needs_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        accumulate = _compute_dtype(hidden_NH)
        tokens = hidden_NH.shape[0]
        weights = problem.weights
        multiplied = _as_multiplied(weight_VH)
        divergence_N = torch.empty(tokens, dtype=accumulate, device=hidden_NH.device)
        at_label_N = torch.empty_like(divergence_N)
        grad_hidden = torch.empty_like(hidden_NH) if needs_gradient else None
        grad_weight = (
            torch.zeros(weight_VH.shape, dtype=accumulate, device=weight_VH.device) if needs_gradient else None
        )
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
        if problem.group.size() > 1:  # each rank has summed over its vocabulary slice only
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
    """(gradient of the logits z, divergence, log-probability of the label) per token.

    The last two are this vocabulary slice's part: the caller sums them over the group.
    """
    weights, group, T = problem.weights, problem.group, problem.weights.temperature
    scaled = z_NV if T == 1 else z_NV / T
    teacher = problem.targets.logits(part, temperature=T)
    stack = [scaled] if teacher is None else [scaled, teacher.to(z_NV.dtype)]
    if T != 1:
        stack.append(z_NV)
    logs = log_softmax_over_ranks(stack, group=group)
    log_q, log_q_plain = logs[0], logs[-1] if T != 1 else logs[0]
    log_p = logs[1] if teacher is not None else None

    labels, is_local = _local(problem.labels_N[part], problem.slice_size, group)
    at_label = log_q_plain.gather(1, labels.unsqueeze(1)).squeeze(1) * is_local
    most_likely = problem.targets.most_likely(part, log_p, group=group)
    if most_likely is not None:
        gradient, divergence = _top_k_divergence(
            log_q,
            most_likely,
            slice_size=problem.slice_size,
            group=group,
            report_entropy=weights.is_cross_entropy,
        )
    else:
        assert log_p is not None
        gradient, divergence = _divergence(log_q, log_p, is_cross_entropy=weights.is_cross_entropy)
    divergence = divergence * T**2
    if not needs_gradient:
        return None, divergence, at_label
    gradient.mul_(T * weights.divergence)
    if weights.next_token:
        softmax = log_q_plain.exp()
        softmax.scatter_add_(1, labels.unsqueeze(1), -is_local.unsqueeze(1).to(softmax.dtype))
        gradient.add_(softmax, alpha=weights.next_token)
    return gradient, divergence, at_label


def _divergence(
    log_q: torch.Tensor, log_p: torch.Tensor, *, is_cross_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q - p, sum over this slice of p (log p - log q) or -p log q). Overwrites `log_p`."""
    difference = log_q.neg() if is_cross_entropy else log_p - log_q
    p = log_p.exp_()
    divergence = difference.mul_(p).sum(1)
    return torch.exp(log_q, out=difference).sub_(p), divergence


def _top_k_divergence(
    log_q: torch.Tensor, teacher: TopK, *, slice_size: int, group: dist.ProcessGroup, report_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_divergence` for k + 1 outcomes: the top k and the rest.

    The gradient of the rest is its excess mass, distributed in proportion to the student's own probabilities.
    """
    ids, is_local = _local(teacher.ids_NK, slice_size, group)
    log_p = teacher.log_p_NK.to(log_q.dtype)
    rest_p = teacher.rest_N.to(log_q.dtype)
    p = log_p.exp() * is_local
    log_q_K = log_q.gather(1, ids)
    q = log_q.exp()
    q_K = q.gather(1, ids) * is_local
    rest = q.scatter_add_(1, ids, -q_K)  # exactly zero at the top-k tokens
    rest_q = rest.sum(1)
    if group.size() > 1:
        dist.all_reduce(rest_q, group=group)
    rest_q = rest_q.clamp_min(torch.finfo(rest_q.dtype).tiny)
    of_rest = -rest_p * torch.log(rest_q)
    of_top_k = -p * log_q_K
    if not report_entropy:
        of_rest = of_rest + torch.xlogy(rest_p, rest_p)
        of_top_k = of_top_k + p * log_p
    divergence = (
        of_top_k.sum(1) + of_rest / group.size()
    )  # every rank has the full term of the rest; the sum needs it once
    gradient = rest.mul_((1 - rest_p / rest_q).unsqueeze(1))
    return gradient.scatter_add_(1, ids, q_K - p), divergence


def log_softmax_over_ranks(logits: list[torch.Tensor], *, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """log-softmax over the whole vocabulary of several [N, V] slices, with one collective over `group` for all of them."""
    logs = [torch.log_softmax(z, dim=1) for z in logits]
    if group.size() == 1:
        return logs
    # log-sum-exp of a slice = largest logit + log(sum of exp(logit - largest)). The two terms are exchanged separately:
    # their sum would lose digits where logits are large.
    local_terms = []
    for z, log in zip(logits, logs, strict=True):
        largest, at_largest = z.max(dim=1)
        local_terms += [largest, -log.gather(1, at_largest.unsqueeze(1)).squeeze(1)]
    parts = torch.stack(local_terms)
    gathered = torch.empty(group.size() * len(local_terms), len(parts[0]), dtype=parts.dtype, device=parts.device)
    dist.all_gather_into_tensor(gathered, parts, group=group)
    gathered = gathered.view(group.size(), *parts.shape)
    for index, log in enumerate(logs):
        largest, sums = gathered[:, 2 * index], gathered[:, 2 * index + 1]
        relative = (largest - parts[2 * index]) + (sums - parts[2 * index + 1])
        log -= torch.logsumexp(relative, dim=0).unsqueeze(1)
    return logs


def top_k_of(log_p_NV: torch.Tensor, k: int, *, slice_size: int, group: dist.ProcessGroup) -> TopK:
    """The k most likely tokens of distributions split over `group`; k is at most the number of all tokens.

    slice_size: ids of each rank, of which the last may have fewer tokens. Collective; on ties the lower rank wins.
    """
    if log_p_NV.shape[1] < min(k, slice_size):  # ranks exchange k tokens each; these have probability 0
        log_p_NV = pad(log_p_NV, (0, slice_size - log_p_NV.shape[1]), value=-torch.inf)
    log_p, ids = log_p_NV.topk(min(k, slice_size), dim=1)
    if group.size() > 1:
        ids = ids + group.rank() * slice_size
        all_log_p = [torch.empty_like(log_p) for _ in range(group.size())]
        all_ids = [torch.empty_like(ids) for _ in range(group.size())]
        dist.all_gather(all_log_p, log_p.contiguous(), group=group)
        dist.all_gather(all_ids, ids.contiguous(), group=group)
        log_p, index = torch.cat(all_log_p, dim=1).topk(min(k, slice_size * group.size()), dim=1)
        ids = torch.cat(all_ids, dim=1).gather(1, index)
    rest = (1 - log_p.double().exp().sum(1)).clamp_min(0).to(log_p.dtype)
    return TopK(ids, log_p, rest)


def _local(ids: torch.Tensor, slice_size: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """(index within this rank's slice, 0 for ids of other slices; whether the id is in this slice)."""
    local = ids - group.rank() * slice_size
    is_local = (local >= 0) & (local < slice_size)
    return torch.where(is_local, local, 0), is_local


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as_multiplied(x: torch.Tensor) -> torch.Tensor:
    """A matrix in the format it is multiplied in. bf16 becomes fp32 on a CPU, where that is 50 times faster."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def capped_logits(hidden_NH: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits of a head over this rank's slice, [N, V], soft-capped, in fp32 (float64 for float64 inputs)."""
    return _logits(hidden_NH, head.weight_VH, head.softcap)


def _logits(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`capped_logits` from the parts of a head."""
    product = multiply(_as_multiplied(hidden_NH), _as_multiplied(weight_VH).t())
    z = product.to(_compute_dtype(product))
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)
