"""Cross-entropy over a vocabulary that is split over the tensor ranks, without gathering it.

Each rank holds logits of its own slice of the vocabulary. The softmax of a slice needs two numbers from the others: the
largest log-sum-exp and the sum of the slices' exponentials below it. fp32 logits are overwritten by the probabilities in
the forward pass, and those by the gradient in the backward pass: no second tensor of their size is ever alive, which at
a vocabulary of 131,072 is what decides how many rows fit.
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


def vocab_parallel_cross_entropy(
    logits_SBV: torch.Tensor, labels_SB: torch.Tensor, *, group: dist.ProcessGroup
) -> torch.Tensor:
    """-log softmax(logits)[label] per token, in nats, fp32.

    logits_SBV: this rank's slice of the vocabulary, slices in rank order; labels_SB: ids in the whole vocabulary.
    -> [sequence, rows]. Mutates fp32 `logits_SBV`. Collective over `group` in the forward pass. Differentiable once.
    """
    return _VocabParallelCrossEntropy.apply(logits_SBV, labels_SB, group)
