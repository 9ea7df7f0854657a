"""Losses on preferences: formulas written out number by number in Python's float64, gradients by hand, and parts that add up."""

import math

import pytest
import torch

from recipes.schema.align import DpoConfig
from train.align.losses.preference import (
    PairLogProbs,
    bradley_terry_losses,
    calibration_error,
    dpo_loss,
    pair_accuracy,
    ranked_pairs,
    ranking_loss,
)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CHOSEN, REJECTED = [-12.5, -3.25, -40.0], [-11.0, -7.5, -300.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -3.0, -35.0], [-10.5, -6.0, -60.0]
CHOSEN_TOKENS, REJECTED_TOKENS = [5, 2, 13], [6, 2, 40]


def pairs_of(part: slice = slice(None), dtype: torch.dtype = torch.float64) -> PairLogProbs:
    values = [torch.tensor(v, dtype=dtype)[part] for v in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    counts = [torch.tensor(v)[part] for v in (CHOSEN_TOKENS, REJECTED_TOKENS)]
    for value in values[:2]:
        value.requires_grad_()
    return PairLogProbs(values[0], values[1], values[2], values[3], *counts)


@pytest.mark.parametrize(
    "options",
    [
        DpoConfig(),
        DpoConfig(beta=0.05, label_smoothing=0.1),
        DpoConfig(beta=2.0, length_normalized=True),
        DpoConfig(beta=0.5, label_smoothing=0.2, length_normalized=True, sft_weight=0.3),
    ],
)
def test_dpo_and_its_gradient_are_the_formula(options: DpoConfig) -> None:
    pairs = pairs_of()
    found = dpo_loss(pairs, options, step_pairs=3, step_chosen_tokens=sum(CHOSEN_TOKENS))
    found.loss.backward()
    loss = 0.0
    for i in range(3):
        divide = (CHOSEN_TOKENS[i], REJECTED_TOKENS[i]) if options.length_normalized else (1, 1)
        chosen = (CHOSEN[i] - REF_CHOSEN[i]) / divide[0]
        rejected = (REJECTED[i] - REF_REJECTED[i]) / divide[1]
        x, e = options.beta * (chosen - rejected), options.label_smoothing
        loss += (-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)) / 3
        slope = (-(1 - e) * sigmoid(-x) + e * sigmoid(x)) * options.beta / 3
        sft = -options.sft_weight / sum(CHOSEN_TOKENS)
        assert pairs.chosen.grad is not None and pairs.rejected.grad is not None
        assert pairs.chosen.grad[i].item() == pytest.approx(slope / divide[0] + sft, rel=1e-12, abs=1e-15)
        assert pairs.rejected.grad[i].item() == pytest.approx(-slope / divide[1], rel=1e-12, abs=1e-15)
        assert found.chosen_rewards[i].item() == pytest.approx(options.beta * chosen, rel=1e-12)
        assert found.rejected_rewards[i].item() == pytest.approx(options.beta * rejected, rel=1e-12)
    sft_loss = -sum(CHOSEN) / sum(CHOSEN_TOKENS)
    assert found.loss.item() == pytest.approx(loss + options.sft_weight * sft_loss, rel=1e-12)
    assert found.sft.item() == pytest.approx(sft_loss, rel=1e-12)


def test_shares_of_microbatches_add_up_to_the_step() -> None:
    options = DpoConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.5)
    whole = dpo_loss(pairs_of(), options, step_pairs=3, step_chosen_tokens=20).loss.item()
    parts = [slice(0, 1), slice(1, 3)]
    shares = [dpo_loss(pairs_of(part), options, step_pairs=3, step_chosen_tokens=20).loss.item() for part in parts]
    assert sum(shares) == pytest.approx(whole, rel=1e-14)


def test_an_equal_policy_has_loss_log_2_and_wrong_signs_are_seen() -> None:
    same = torch.tensor([-5.0], dtype=torch.float64)
    pairs = PairLogProbs(same.clone().requires_grad_(), same.clone().requires_grad_(), same, same, same, same)
    found = dpo_loss(pairs, DpoConfig(), step_pairs=1, step_chosen_tokens=1)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert pairs.chosen.grad is not None and pairs.chosen.grad < 0  # a step of descent raises the chosen answer
    assert pairs.rejected.grad is not None and pairs.rejected.grad > 0


def test_bradley_terry_with_margins_and_centre() -> None:
    chosen, rejected, margins = [1.5, -0.5, 60.0], [0.5, 1.0, -60.0], [0.0, 1.0, 3.0]
    tensors = [torch.tensor(v, dtype=torch.float64) for v in (chosen, rejected, margins)]
    expected = -sum(log_sigmoid(a - b) for a, b in zip(chosen, rejected, strict=True)) / 3
    assert bradley_terry_losses(tensors[0], tensors[1]).mean().item() == pytest.approx(expected, rel=1e-12)
    expected = (
        sum(-log_sigmoid(a - b - m) + 0.01 * (a + b) ** 2 for a, b, m in zip(chosen, rejected, margins, strict=True))
        / 4
    )
    found = bradley_terry_losses(tensors[0], tensors[1], margin_N=tensors[2], center_weight=0.01)
    assert found.sum().item() / 4 == pytest.approx(expected, rel=1e-12)
    pairs = ranked_pairs(torch.stack(tensors[:2], dim=1), torch.tensor([[0, 1]] * 3))
    expected = sum(-log_sigmoid(a - b) + 0.01 * (a + b) ** 2 for a, b in zip(chosen, rejected, strict=True)) / 4
    assert ranking_loss(pairs, step_contexts=4, center_weight=0.01).item() == pytest.approx(expected, rel=1e-12)


def test_a_ranking_is_the_mean_over_its_pairs() -> None:
    """Ties form no pair, absent answers are not read, and two answers are one Bradley-Terry pair."""
    rewards = torch.tensor([[0.3, -1.0, 2.0, 0.9], [1.0, 0.0, math.nan, math.inf], [5.0, 4.0, 0.0, 0.0]])
    ranks = torch.tensor([[1, 2, 0, 1], [1, 0, -1, -1], [2, 2, -1, -1]])
    leaf = rewards.double().requires_grad_()
    loss = ranking_loss(ranked_pairs(leaf, ranks), step_contexts=3)
    loss.backward()
    first = [(2.0, 0.3), (2.0, 0.9), (2.0, -1.0), (0.3, -1.0), (0.9, -1.0)]
    expected = -sum(log_sigmoid(a - b) for a, b in first) / 5 / 3 - log_sigmoid(0.0 - 1.0) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[2].any()
    assert leaf.grad[1, 0].item() == pytest.approx(sigmoid(1.0) / 3, rel=1e-12)


def test_accuracy_and_calibration_by_hand() -> None:
    chosen = torch.tensor([math.log(3), math.log(3), math.log(3), -math.log(3), 2.0])
    rejected = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0])
    assert pair_accuracy(chosen, rejected).item() == pytest.approx(0.7)
    assert calibration_error(chosen[:4], rejected[:4]).item() == pytest.approx(
        0.0, abs=1e-7
    )  # says 3/4, is right 3 of 4
    assert calibration_error(chosen[:3], rejected[:3]).item() == pytest.approx(0.25, abs=1e-7)
    sure = torch.full((4,), 50.0)
    assert calibration_error(-sure, sure).item() == pytest.approx(1.0, abs=1e-7)
