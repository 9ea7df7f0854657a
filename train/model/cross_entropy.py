"""Cross-entropy over a vocabulary that is split over the tensor ranks, without gathering the logits.

Each rank has the logits of its own slice of the vocabulary. The softmax needs two numbers per token from the other ranks:
the largest log-sum-exp of the slices, and the sum of the slices' exponentials relative to it. The forward pass only reads
the logits; the backward pass computes the probabilities again and overwrites the logits with the gradient. So there is
never a second tensor of that size: at a vocabulary of 131,072 that memory decides how many rows fit. On a CPU forward and
backward each read the logits once (`passes.c`).

The last rank's slice may end in rows that stand for no token (`model.vocab_padding`). They are not in the softmax, and their
gradient is zero.
"""

from typing import Any

import torch
import torch.distributed as dist

from train.model.head import token_rows
from train.native import passes

PART_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Logits processed at once in plain torch. CPU: temporaries fit the cache. GPU: temporaries have a bounded size."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_SBV: torch.Tensor,
        labels_SB: torch.Tensor,
        group: dist.ProcessGroup,
        cap: float | None,
        padding: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_SBV = logits_SBV.contiguous()
        slice_size = logits_SBV.shape[-1]
        real = token_rows(slice_size, padding, group)
        lines, labels = _lines(logits_SBV, real), labels_SB.reshape(-1)
        if group.size() > 1:
            labels = labels - group.rank() * slice_size
            labels = torch.where((labels >= 0) & (labels < lines.shape[1]), labels, -1)
        log_sum, target = _log_sums(lines, labels, cap)
        if group.size() > 1:
            own = log_sum.clone()
            dist.all_reduce(log_sum, op=dist.ReduceOp.MAX, group=group)
            total = torch.exp(own - log_sum)
            dist.all_reduce(total, group=group)
            log_sum += torch.log(total)
            dist.all_reduce(target, group=group)
        ctx.save_for_backward(logits_SBV, log_sum, labels)
        ctx.cap, ctx.real = cap, real
        ctx.set_materialize_grads(False)
        return (log_sum - target).view(labels_SB.shape), log_sum.clone().view(labels_SB.shape)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_SB: torch.Tensor, grad_log_sum_SB: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None, None]:
        logits_SBV, log_sum, labels = ctx.saved_tensors
        logits_SBV.detach()[..., ctx.real :] = 0
        lines, grad = _lines(logits_SBV, ctx.real), grad_SB.reshape(-1)
        if grad_log_sum_SB is None:
            _gradients_(lines, labels, log_sum, grad.contiguous(), ctx.cap)
            return logits_SBV.detach(), None, None, None, None
        # g softmax + h (softmax - onehot) = (g + h) (softmax - onehot) + g onehot
        extra = grad_log_sum_SB.reshape(-1)
        at_label = labels.clamp(min=0)[:, None]
        onehot = extra * (labels >= 0)
        if ctx.cap is not None:
            onehot = onehot * (1 - torch.tanh(lines.gather(1, at_label)[:, 0].float() / ctx.cap) ** 2)
        _gradients_(lines, labels, log_sum, (grad + extra).contiguous(), ctx.cap)
        lines.scatter_add_(1, at_label, onehot[:, None].to(lines.dtype))
        return logits_SBV.detach(), None, None, None, None


def _lines(logits_SBV: torch.Tensor, real: int) -> torch.Tensor:
    """[tokens, the first `real` columns], detached: autograd raises an error for a saved view that is modified in place."""
    return logits_SBV.detach().view(-1, logits_SBV.shape[-1])[:, :real]


def _log_sums(lines: torch.Tensor, labels: torch.Tensor, cap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """log-sum-exp of each line's (capped) logits, and its (capped) logit at the label, 0 if the label is negative; fp32."""
    if passes.usable(lines):
        return passes.loss_forward(lines, labels.contiguous(), cap=cap)
    target = lines.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).float()
    target = (target if cap is None else _capped(target, cap)) * (labels >= 0)
    log_sum = torch.empty_like(target)
    for part in _parts(lines):
        x = lines[part].float()
        torch.logsumexp(x if cap is None else _capped(x, cap), dim=1, out=log_sum[part])
    return log_sum, target


def _gradients_(
    lines: torch.Tensor, labels: torch.Tensor, log_sum: torch.Tensor, grad: torch.Tensor, cap: float | None
) -> None:
    """In place: logits become grad (softmax - onehot(label)), times the slope of the cap."""
    if passes.usable(lines):
        passes.loss_backward_(lines, labels.contiguous(), log_sum, grad, cap=cap)
        return
    at_label = -(labels >= 0).to(log_sum.dtype)
    for part in _parts(lines):
        x = lines[part].float()
        if cap is not None:
            t = (x / cap).tanh_()
            x = t * cap
        p = x.sub_(log_sum[part, None]).exp_() if cap is not None else torch.exp(x - log_sum[part, None])
        p.scatter_add_(1, labels[part, None].clamp(min=0), at_label[part, None])
        p.mul_(grad[part, None])
        lines[part] = p if cap is None else torch.addcmul(p, p * t, t, value=-1)


def _parts(lines: torch.Tensor) -> list[slice]:
    size = max(1, PART_LOGITS.get(lines.device.type, 1 << 24) // lines.shape[1])
    return [slice(start, start + size) for start in range(0, lines.shape[0], size)]


def _capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cap: float) -> torch.Tensor:
        t = torch.tanh(x / cap)
        ctx.save_for_backward(t)
        return t * cap

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (t,) = ctx.saved_tensors
        return torch.addcmul(grad, grad * t, t, value=-1), None


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap): close to x for small x, never larger than the cap (Gemma 2, arXiv 2408.00118)."""
    return _SoftCap.apply(x, cap)


def vocab_parallel_cross_entropy(
    logits_SBV: torch.Tensor,
    labels_SB: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    softcap: float | None = None,
    padding: int = 0,
) -> torch.Tensor:
    """-log softmax(logits)[label] per token, in nats, fp32; with softcap, of the soft-capped logits.

    logits_SBV: this rank's slice of the vocabulary, slices in rank order; labels_SB: ids in the whole vocabulary.
    padding: the last columns of the last slice that are not in the softmax; no label is one of them.
    -> [sequence, rows]. The backward pass overwrites `logits_SBV` (if contiguous, else a copy), so it can run only once.
    Collective over `group` in the forward pass.
    """
    return cross_entropy_and_log_sums(logits_SBV, labels_SB, group=group, softcap=softcap, padding=padding)[0]


def cross_entropy_and_log_sums(
    logits_SBV: torch.Tensor,
    labels_SB: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    softcap: float | None = None,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`vocab_parallel_cross_entropy`, log-sum-exp of the same logits), each [sequence, rows], fp32. The loss must take part in
    the backward pass."""
    return _VocabParallelCrossEntropy.apply(logits_SBV, labels_SB, group, softcap, padding)
