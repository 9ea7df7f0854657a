"""Losses on preferences: DPO on log-probabilities of answers, Bradley-Terry on rewards.

Shapes: N pairs of this microbatch; K ranked answers to each of C contexts, padded with absent ones.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from recipes.schema.align import DpoConfig


@dataclass(frozen=True)
class PairLogProbs:
    """Natural log-probabilities of a pair's answers given the context, each summed over the answer's tokens: [N] each.

    The reference's have no gradient. The numbers of tokens are read only by length normalisation and the SFT term.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


@dataclass(frozen=True)
class PairLoss:
    """Share of the step's loss, and what is reported."""

    loss: torch.Tensor
    """Scalar with gradient: preference + sft_weight * sft."""
    preference: torch.Tensor
    """Scalar without gradient."""
    sft: torch.Tensor
    """Scalar without gradient."""
    chosen_rewards: torch.Tensor
    """beta x log-ratio to the reference, [N], without gradient; its margin over the rejected one is the implicit reward."""
    rejected_rewards: torch.Tensor


def implicit_rewards(pairs: PairLogProbs, config: DpoConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the chosen, of the rejected answers): beta x log-ratio to the reference, [N] each."""
    chosen_N = pairs.chosen - pairs.reference_chosen
    rejected_N = pairs.rejected - pairs.reference_rejected
    if config.length_normalized:
        chosen_N = chosen_N / pairs.chosen_tokens.clamp(min=1)
        rejected_N = rejected_N / pairs.rejected_tokens.clamp(min=1)
    return config.beta * chosen_N, config.beta * rejected_N


def dpo_loss(pairs: PairLogProbs, config: DpoConfig, *, step_pairs: float, step_chosen_tokens: float) -> PairLoss:
    """-log sigmoid(beta (chosen log-ratio - rejected log-ratio)), smoothed, summed and divided by the step's pairs
    (arXiv 2305.18290, equation 7).

    step_pairs, step_chosen_tokens: of all microbatches and data ranks together.
    """
    chosen_N, rejected_N = implicit_rewards(pairs, config)
    margin_N = chosen_N - rejected_N
    smoothing = config.label_smoothing
    losses_N = -(1 - smoothing) * F.logsigmoid(margin_N) - smoothing * F.logsigmoid(-margin_N)
    preference = losses_N.sum() / step_pairs
    sft = -pairs.chosen.sum() / (step_chosen_tokens or 1)
    loss = preference + config.sft_weight * sft if config.sft_weight else preference
    return PairLoss(
        loss,
        preference.detach(),
        sft.detach(),
        chosen_N.detach(),
        rejected_N.detach(),
    )


def bradley_terry_losses(
    better_N: torch.Tensor,
    worse_N: torch.Tensor,
    *,
    margin_N: torch.Tensor | None = None,
    center_weight: float = 0.0,
) -> torch.Tensor:
    """-log sigmoid(r better - r worse - margin) of each pair, [N]. Rewards: [N].

    margin_N: how much better the first answer is (Llama 2, arXiv 2307.09288, equation 2). center_weight: of (r better +
    r worse)^2, which fixes the free constant of rewards near 0 (arXiv 2312.09244).
    """
    gap_N = better_N - worse_N if margin_N is None else better_N - worse_N - margin_N
    losses_N = -F.logsigmoid(gap_N)
    if center_weight:
        losses_N = losses_N + center_weight * (better_N + worse_N) ** 2
    return losses_N


@dataclass(frozen=True)
class RankedPairs:
    """All pairs of answers to the same context that have different ranks."""

    better_N: torch.Tensor
    """Rewards of the better answers, [N]."""
    worse_N: torch.Tensor
    weight_N: torch.Tensor
    """1 / pairs of the same context, so that each context counts once however many answers it has."""


def ranked_pairs(rewards_CK: torch.Tensor, ranks_CK: torch.Tensor) -> RankedPairs:
    """The pairs of C contexts with K ranked answers each.

    ranks_CK: int, lower is better; equal ranks form no pair; -1: absent. InstructGPT, arXiv 2203.02155, equation 1: all pairs
    of a context belong to one step, because they are not independent.
    """
    present = ranks_CK >= 0
    is_better_CKK = ranks_CK[:, :, None] < ranks_CK[:, None, :]
    is_pair_CKK = is_better_CKK & present[:, :, None] & present[:, None, :]
    # Only pairs are computed: the reward of an absent answer may be anything, and 0 x NaN is NaN.
    context_N, better_N, worse_N = is_pair_CKK.nonzero(as_tuple=True)
    pairs_C = is_pair_CKK.sum(dim=(1, 2)).to(rewards_CK.dtype)
    return RankedPairs(rewards_CK[context_N, better_N], rewards_CK[context_N, worse_N], 1 / pairs_C[context_N])


def ranking_loss(pairs: RankedPairs, *, step_contexts: float, center_weight: float = 0.0) -> torch.Tensor:
    """Bradley-Terry over all pairs of ranked answers: the mean over a context's pairs, summed, divided by the step's contexts.
    With two answers to each context it is the usual loss of pairs."""
    losses_N = bradley_terry_losses(pairs.better_N, pairs.worse_N, center_weight=center_weight)
    return (losses_N * pairs.weight_N).sum() / step_contexts


def pair_accuracy(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> torch.Tensor:
    """Share of pairs whose chosen answer has the higher reward; equal rewards count as half."""
    return (chosen_N > rejected_N).double().mean() + 0.5 * (chosen_N == rejected_N).double().mean()


def calibration_error(chosen_N: torch.Tensor, rejected_N: torch.Tensor, *, bins: int = 10) -> torch.Tensor:
    """Expected calibration error of a reward model's probabilities (arXiv 1706.04599, equation 3), from 0 to 1.

    The model predicts the answer with the higher reward, with probability sigmoid(|difference|), from 0.5 to 1.
    """
    gaps_N = (chosen_N - rejected_N).double()
    confidence_N = torch.sigmoid(gaps_N.abs())
    is_right_N = torch.where(gaps_N == 0, 0.5, (gaps_N > 0).double())
    bin_N = ((confidence_N - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap_by_bin = torch.zeros(bins, dtype=torch.float64, device=gaps_N.device)
    return gap_by_bin.index_add_(0, bin_N, confidence_N - is_right_N).abs().sum() / len(gaps_N)
