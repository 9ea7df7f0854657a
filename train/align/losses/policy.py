"""GRPO's loss on sampled answers, and the advantages that it needs.

    rewards of P prompts x G answers --group_advantages--> advantages --policy_loss--> share of the step's loss

Shapes: P prompts, G answers to each; B answers of this microbatch, T tokens of the longest one.

    ratio r = exp(log p - log p old)                                   old: the policy when the step began
    loss of a token = -w min(r A, clip(r, 1 - low, 1 + high) A) + kl_weight KL(policy, reference)
    w = min(exp(log p old - log p sampler), cap)                       the sampler: the policy that wrote the answers

GRPO: arXiv 2402.03300. Token-level sum, clip-higher, overlong filtering, dynamic sampling: DAPO, arXiv 2503.14476. Sequence
ratio: GSPO, arXiv 2507.18071. Truncated importance weights: arXiv 2312.05230 and NeMo-RL's `truncated_importance_sampling`.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from recipes.schema.align import GrpoConfig


@dataclass(frozen=True)
class Answers:
    """Sampled answers with their log-probabilities, [B, T] each, at temperature 1. Values where `mask` is 0 are not read."""

    log_probs: torch.Tensor
    """Of the policy that is trained; with gradient."""
    old_log_probs: torch.Tensor
    """Of the policy when the step began."""
    mask: torch.Tensor
    """bool: the answers' tokens, the end token included. An answer of zeros does not count (`without_overlong`)."""
    advantages: torch.Tensor
    """[B]."""
    reference_log_probs: torch.Tensor | None = None
    sampler_log_probs: torch.Tensor | None = None
    """Of the policy that wrote the answers, as the sampler reported them."""


@dataclass(frozen=True)
class PolicyLoss:
    """Share of the step's loss, and sums over this microbatch's tokens that are reported (all without gradient)."""

    loss: torch.Tensor
    """Scalar with gradient."""
    tokens: torch.Tensor
    clipped_low: torch.Tensor
    """Tokens whose ratio is below 1 - clip_low, with a negative advantage: they have no gradient."""
    clipped_high: torch.Tensor
    """Tokens whose ratio is above 1 + clip_high, with a positive advantage."""
    kl: torch.Tensor
    """Sum of the KL estimates; 0 without a reference."""
    largest_log_ratio: torch.Tensor
    """Its largest absolute value, of a token or an answer."""
    capped: torch.Tensor
    """Tokens whose importance weight was capped."""


def policy_loss(answers: Answers, config: GrpoConfig, *, step_tokens: int, step_answers: int) -> PolicyLoss:
    """The clipped policy gradient of the module docstring.

    step_tokens, step_answers: those that count (mask) in all microbatches and data ranks together.
    """
    mask = answers.mask.bool()
    tokens_B = mask.sum(dim=1)
    # Masked values may be anything: with `where` before any arithmetic, NaN and infinity reach neither loss nor gradient.
    log_probs = _masked(answers.log_probs, mask)
    old = _masked(answers.old_log_probs, mask).detach()
    log_ratio = log_probs - old
    if config.ratio == "sequence":
        log_ratio = (log_ratio.sum(dim=1) / tokens_B.clamp(min=1))[:, None].expand_as(mask)
    ratio = torch.exp(log_ratio)
    advantages = answers.advantages[:, None].to(ratio.dtype)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    capped = mask.new_zeros(mask.shape)
    if config.importance_cap is not None:
        assert answers.sampler_log_probs is not None, "importance weights need the sampler's log-probabilities"
        weights = torch.exp(old - _masked(answers.sampler_log_probs, mask).detach())
        capped = weights > config.importance_cap
        losses = losses * weights.clamp(max=config.importance_cap)
    kl = torch.zeros_like(log_probs)
    if answers.reference_log_probs is not None:
        kl = kl_estimate(log_probs, _masked(answers.reference_log_probs, mask).detach(), config.kl_estimator)
    assert not config.kl_weight or answers.reference_log_probs is not None, "the KL term needs a reference"
    if config.kl_weight:
        losses = losses + config.kl_weight * kl
    losses = losses * mask
    if config.mean_over == "tokens":
        loss = losses.sum() / max(1, step_tokens)
    else:
        loss = (losses.sum(dim=1) / tokens_B.clamp(min=1)).sum() / max(1, step_answers)
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            tokens=mask.sum(),
            clipped_low=((ratio < 1 - config.clip_low) & (advantages < 0) & mask).sum(),
            clipped_high=((ratio > 1 + config.clip_high) & (advantages > 0) & mask).sum(),
            kl=(kl * mask).sum(),
            largest_log_ratio=(log_ratio.abs() * mask).max() if mask.numel() else log_ratio.new_zeros(()),
            capped=(capped & mask).sum(),
        )


def kl_estimate(log_probs: torch.Tensor, reference: torch.Tensor, estimator: Literal["k1", "k2", "k3"]) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled, of any shape.

    With d = log p - log p reference: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d (J. Schulman, Approximating KL divergence,
    2020). k1 and k3 have the right mean; k2 and k3 are never negative.
    """
    gap = log_probs - reference
    match estimator:
        case "k1":
            return gap
        case "k2":
            return gap.square() / 2
        case "k3":
            return torch.expm1(-gap) + gap


def group_advantages(
    rewards_PG: torch.Tensor,
    *,
    valid_PG: torch.Tensor | None = None,
    leave_one_out: bool = False,
    normalize: bool = True,
    eps: float = 1e-4,
) -> torch.Tensor:
    """Advantage of each answer over the others to its prompt: [P, G], in the format of the rewards.

    leave_one_out: the baseline is the mean of the other answers (arXiv 2402.14740) instead of all. normalize: divide by the
    group's standard deviation (unbiased) + eps. valid_PG: false for answers without a usable reward (a verifier failed): they
    belong to no baseline and get 0. So does every answer of a group whose valid rewards are equal.
    """
    valid = torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG.bool()
    rewards = _masked(rewards_PG, valid)
    count_P1 = valid.sum(dim=1, keepdim=True).to(rewards.dtype)
    gaps = _masked(rewards - rewards.sum(dim=1, keepdim=True) / count_P1.clamp(min=1), valid)
    advantages = gaps
    if leave_one_out:  # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        advantages = gaps * count_P1 / (count_P1 - 1).clamp(min=1)
    if normalize:
        deviation_P1 = (gaps.square().sum(dim=1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
        advantages = advantages / (deviation_P1 + eps)
    # Equal rewards: exactly 0, not the rounding of their mean divided by eps.
    return torch.where(informative_groups(rewards, valid)[:, None], advantages, 0.0).to(rewards_PG.dtype)


def informative_groups(rewards_PG: torch.Tensor, valid_PG: torch.Tensor | None = None) -> torch.Tensor:
    """Dynamic sampling: which groups have at least two different valid rewards, [P] bool. The others have no gradient."""
    valid = torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG.bool()
    largest = torch.where(valid, rewards_PG, -torch.inf).amax(dim=1)
    smallest = torch.where(valid, rewards_PG, torch.inf).amin(dim=1)
    return largest > smallest


def without_overlong(mask_BT: torch.Tensor, ended_B: torch.Tensor) -> torch.Tensor:
    """Overlong filtering: the mask without answers that were cut off at the limit instead of ending, [B, T]."""
    return mask_BT & ended_B[:, None].bool()


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values where the mask is true, 0 elsewhere, without their gradient there."""
    return torch.where(mask, values, 0.0)
