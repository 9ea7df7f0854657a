"""Cross-entropy over a vocabulary that is split over the tensor ranks, without gathering it.

Each rank holds logits of its own slice of the vocabulary. The softmax of a slice needs two numbers from the others: the
largest log-sum-exp and the sum of the slices' exponentials below it. fp32 logits are overwritten by the probabilities in
the forward pass, and those by the gradient in the backward pass: no second tensor of their size is ever alive, which at
a vocabulary of 131,072 is what decides how many rows fit. With a soft cap the tanh of the logits takes the place of the
probabilities, which are made from it again, a few rows at a time.
"""

from typing import Any

import torch
import torch.distributed as dist


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SBV: torch.Tensor, labels_SB: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        storage = logits_SBV.dtype
        logits_SBV = logits_SBV.float()
        ranks, size = group.size(), logits_SBV.shape[-1]
        local_labels, is_here = labels_SB, None
        if ranks > 1:
            local_labels = labels_SB - group.rank() * size
            is_here = (local_labels >= 0) & (local_labels < size)
            local_labels = torch.where(is_here, local_labels, 0)
        target = logits_SBV.gather(-1, local_labels.unsqueeze(-1)).squeeze(-1)
        largest, where = logits_SBV.max(dim=-1)
        probabilities = torch.softmax(logits_SBV, dim=-1, out=logits_SBV)
        # log-sum-exp from the largest entry alone: log p_max lies in [-log V, 0], so nothing cancels.
        log_sum = largest - torch.log(probabilities.gather(-1, where.unsqueeze(-1)).squeeze(-1))
        if is_here is not None:
            slice_log_sum = log_sum
            log_sum = slice_log_sum.clone()
            dist.all_reduce(log_sum, op=dist.ReduceOp.MAX, group=group)
            total = torch.exp(slice_log_sum - log_sum)
            dist.all_reduce(total, group=group)
            log_sum = log_sum + torch.log(total)
            probabilities.mul_(torch.exp(slice_log_sum - log_sum).unsqueeze(-1))
            target = target * is_here
            dist.all_reduce(target, group=group)
        ctx.save_for_backward(probabilities, local_labels, is_here)
        ctx.storage = storage
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, grad_SB: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        probabilities, local_labels, is_here = ctx.saved_tensors
        grad_SB = grad_SB.contiguous()
        grad_SBV = probabilities.mul_(grad_SB.unsqueeze(-1))
        at_label = -grad_SB if is_here is None else -grad_SB * is_here
        grad_SBV.view(-1, grad_SBV.shape[-1]).scatter_add_(1, local_labels.reshape(-1, 1), at_label.view(-1, 1))
        return grad_SBV.to(ctx.storage), None, None


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
    """cap * tanh(x / cap): close to x where that is small, never beyond the cap (Gemma 2, arXiv 2408.00118)."""
    return _SoftCap.apply(x, cap)


class _CappedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_SBV: torch.Tensor, labels_SB: torch.Tensor, group: dist.ProcessGroup, cap: float
    ) -> torch.Tensor:
        tanh = logits_SBV.float().div_(cap) if logits_SBV.dtype == torch.float32 else logits_SBV.float() / cap
        tanh.tanh_()
        lines, labels = tanh.view(-1, tanh.shape[-1]), labels_SB.reshape(-1)
        local_labels, is_here = labels, None
        if group.size() > 1:
            local_labels = labels - group.rank() * lines.shape[1]
            is_here = (local_labels >= 0) & (local_labels < lines.shape[1])
            local_labels = torch.where(is_here, local_labels, 0)
        target = lines.gather(1, local_labels[:, None]).squeeze(1) * cap
        log_sum = torch.empty_like(target)
        for part in _parts(lines):
            torch.logsumexp(lines[part] * cap, dim=1, out=log_sum[part])
        if is_here is not None:
            own = log_sum.clone()
            dist.all_reduce(log_sum, op=dist.ReduceOp.MAX, group=group)
            total = torch.exp(own - log_sum)
            dist.all_reduce(total, group=group)
            log_sum += torch.log(total)
            target = target * is_here
            dist.all_reduce(target, group=group)
        ctx.save_for_backward(tanh, log_sum, local_labels, is_here)
        ctx.storage, ctx.cap = logits_SBV.dtype, cap
        return (log_sum - target).view(labels_SB.shape)

    @staticmethod
    def backward(ctx: Any, grad_SB: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        tanh, log_sum, local_labels, is_here = ctx.saved_tensors
        grad = grad_SB.reshape(-1, 1)
        at_label = -torch.ones_like(log_sum) if is_here is None else -is_here.to(log_sum.dtype)
        lines = tanh.view(-1, tanh.shape[-1])
        for part in _parts(lines):
            t = lines[part]
            p = t.mul(ctx.cap).sub_(log_sum[part, None]).exp_()
            p.scatter_add_(1, local_labels[part, None], at_label[part, None])
            p.mul_(grad[part])
            torch.addcmul(p, p * t, t, value=-1, out=t)
        return tanh.to(ctx.storage), None, None, None


def _parts(lines: torch.Tensor) -> list[slice]:
    """Stretches of lines small enough that their temporaries stay in a cache."""
    size = max(1, (1 << 18) // lines.shape[1])
    return [slice(start, start + size) for start in range(0, lines.shape[0], size)]


def vocab_parallel_cross_entropy(
    logits_SBV: torch.Tensor, labels_SB: torch.Tensor, *, group: dist.ProcessGroup, softcap: float | None = None
) -> torch.Tensor:
    """-log softmax(logits)[label] per token, in nats, fp32; of soft-capped logits where a cap is given.

    logits_SBV: this rank's slice of the vocabulary, slices in rank order; labels_SB: ids in the whole vocabulary.
    -> [sequence, rows]. Mutates fp32 `logits_SBV`. Collective over `group` in the forward pass. Differentiable once.
    """
    if softcap is not None:
        return _CappedCrossEntropy.apply(logits_SBV, labels_SB, group, softcap)
    return _VocabParallelCrossEntropy.apply(logits_SBV, labels_SB, group)
