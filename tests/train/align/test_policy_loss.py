"""GRPO's loss and advantages: each option against Python's float64 token by token, and what must have no influence."""

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from recipes.schema.align import GrpoConfig
from train.align.losses.policy import (
    Answers,
    group_advantages,
    informative_groups,
    kl_estimate,
    policy_loss,
    without_overlong,
)

LENGTHS = [4, 1, 0, 3]
ADVANTAGES = [1.5, -0.7, 2.0, -1.2]


def answers_of(seed: int = 0, fill: float = math.nan) -> Answers:
    """Four answers, one of them empty; every masked value is `fill`. Ratios are far enough from 1 to be clipped."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]

    def draw(spread: float) -> torch.Tensor:
        values = -2 + spread * torch.randn(4, 5, generator=generator, dtype=torch.float64)
        return torch.where(mask, values, fill)

    return Answers(
        log_probs=draw(0.4).requires_grad_(), old_log_probs=draw(0.4), mask=mask,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64), reference_log_probs=draw(0.6),
        sampler_log_probs=draw(0.4),
    )  # fmt: skip


def by_hand(answers: Answers, options: GrpoConfig, *, tokens: int, count: int) -> tuple[float, dict[str, int]]:
    """The loss, and how many tokens are clipped and capped."""
    p, q, reference, sampler = (
        v.detach().tolist()  # type: ignore[union-attr]
        for v in (answers.log_probs, answers.old_log_probs, answers.reference_log_probs, answers.sampler_log_probs)
    )
    total, seen = 0.0, {"low": 0, "high": 0, "capped": 0}
    for i, length in enumerate(LENGTHS):
        mean = sum(p[i][t] - q[i][t] for t in range(length)) / max(1, length)
        losses = []
        for t in range(length):
            r = math.exp(mean if options.ratio == "sequence" else p[i][t] - q[i][t])
            a = ADVANTAGES[i]
            clipped = min(max(r, 1 - options.clip_low), 1 + options.clip_high)
            loss = -min(r * a, clipped * a)
            seen["low"] += r < 1 - options.clip_low and a < 0
            seen["high"] += r > 1 + options.clip_high and a > 0
            if options.importance_cap is not None:
                w = math.exp(q[i][t] - sampler[i][t])
                seen["capped"] += w > options.importance_cap
                loss *= min(w, options.importance_cap)
            d = p[i][t] - reference[i][t]
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[options.kl_estimator]
            losses.append(loss + options.kl_weight * kl)
        total += sum(losses) / tokens if options.mean_over == "tokens" else sum(losses) / max(1, length) / count
    return total, seen


OPTIONS: list[dict[str, Any]] = [
    {}, {"clip_high": 0.28}, {"kl_weight": 0.05}, {"kl_weight": 0.05, "kl_estimator": "k2"},
    {"kl_weight": 0.05, "kl_estimator": "k1"}, {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    {"mean_over": "answers", "kl_weight": 0.01}, {"importance_cap": 1.1},
    {"ratio": "sequence", "mean_over": "answers", "importance_cap": 1.2, "kl_weight": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("changes", OPTIONS)
def test_the_loss_is_the_formula_and_its_gradient_a_difference_quotient(changes: dict[str, Any]) -> None:
    options, answers = GrpoConfig(**{"kl_weight": 0.0} | changes), answers_of()
    found = policy_loss(answers, options, step_tokens=10, step_answers=3)
    expected, seen = by_hand(answers, options, tokens=10, count=3)
    assert found.loss.item() == pytest.approx(expected, rel=1e-12)
    counts = {"low": found.clipped_low, "high": found.clipped_high, "capped": found.capped}
    assert {name: int(value) for name, value in counts.items()} == seen and int(found.tokens) == sum(LENGTHS)
    found.loss.backward()
    assert answers.log_probs.grad is not None and not answers.log_probs.grad[~answers.mask].any()
    for i, t in [(0, 0), (0, 3), (1, 0), (3, 2)]:
        values = []
        for sign in (1, -1):
            moved = answers.log_probs.detach().clone()
            moved[i, t] += sign * 1e-6
            values.append(by_hand(replace(answers, log_probs=moved), options, tokens=10, count=3)[0])
        slope = (values[0] - values[1]) / 2e-6
        assert answers.log_probs.grad[i, t].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_shares_of_microbatches_add_up_to_the_step() -> None:
    for changes in OPTIONS:
        options, answers = GrpoConfig(**{"kl_weight": 0.0} | changes), answers_of()
        whole = policy_loss(answers, options, step_tokens=8, step_answers=4).loss.item()
        shares = 0.0
        for part in (slice(0, 1), slice(1, 4)):
            fields = {name: getattr(answers, name)[part] for name in Answers.__dataclass_fields__}
            shares += policy_loss(Answers(**fields), options, step_tokens=8, step_answers=4).loss.item()
        assert shares == pytest.approx(whole, rel=1e-13)


def test_masked_values_have_no_influence() -> None:
    options = GrpoConfig(kl_weight=0.1, importance_cap=2.0)
    losses = [
        policy_loss(answers_of(fill=x), options, step_tokens=8, step_answers=4).loss for x in (math.nan, -math.inf, 3)
    ]
    assert losses[0].isfinite() and losses[0] == losses[1] == losses[2]
    empty = replace(answers_of(), mask=torch.zeros(4, 5, dtype=torch.bool))
    assert policy_loss(empty, options, step_tokens=0, step_answers=0).loss == 0


def test_first_step_has_the_policy_gradient_and_advantage_of_zero_none() -> None:
    """With ratio 1 the gradient is -A / tokens; with advantage 0 nothing is learned."""
    answers = answers_of()
    answers = replace(answers, old_log_probs=answers.log_probs.detach())
    policy_loss(answers, GrpoConfig(kl_weight=0.0), step_tokens=8, step_answers=4).loss.backward()
    assert answers.log_probs.grad is not None
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            assert answers.log_probs.grad[i, t].item() == pytest.approx(-ADVANTAGES[i] / 8, rel=1e-12)
    answers.log_probs.grad = None
    still = replace(answers, advantages=torch.zeros(4, dtype=torch.float64))
    policy_loss(still, GrpoConfig(kl_weight=0.0), step_tokens=8, step_answers=4).loss.backward()
    assert not answers.log_probs.grad.any()


def test_kl_estimates_have_the_mean_of_the_divergence() -> None:
    """k1 and k3 exactly, summed over a whole distribution; k2 to second order."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.45, 0.33, 0.22], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    for name, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.05)):
        mean = (p * kl_estimate(p.log(), q.log(), name)).sum().item()  # type: ignore[arg-type]
        assert mean == pytest.approx(exact, rel=tolerance)
    tiny = kl_estimate(torch.tensor(1e-6), torch.tensor(0.0), "k3")
    assert tiny.item() == pytest.approx(5e-13, rel=1e-3, abs=6e-14)  # half a unit in the last place of 1e-6


def test_advantages_by_hand() -> None:
    rewards = [[1.0, 0.0, 0.0, 0.5], [0.1, 0.1, 0.1, 0.1], [0.0, 1.0, 7.0, math.nan]]
    valid = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    tensor = torch.tensor(rewards, dtype=torch.float64)
    row = rewards[0]
    mean, deviation = statistics.fmean(row), statistics.stdev(row)
    found = group_advantages(tensor, valid_PG=valid)
    assert found[0].tolist() == pytest.approx([(r - mean) / (deviation + 1e-4) for r in row], rel=1e-12)
    assert found[1].tolist() == [0.0] * 4
    assert found[2].tolist() == pytest.approx([-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4), 0, 0])
    found = group_advantages(tensor, valid_PG=valid, leave_one_out=True, normalize=False)
    others = [r - statistics.fmean(row[:i] + row[i + 1 :]) for i, r in enumerate(row)]
    assert found[0].tolist() == pytest.approx(others, rel=1e-12) and found[2].tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert informative_groups(tensor, valid).tolist() == [True, False, True]
    alone = torch.tensor([[True, False, False, False]] * 3)
    assert not informative_groups(tensor, alone).any() and not group_advantages(tensor, valid_PG=alone).any()


def test_overlong_answers_do_not_count() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    assert without_overlong(mask, torch.tensor([False, True])).tolist() == [[False, False], [True, False]]
