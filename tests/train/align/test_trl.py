"""Our losses next to TRL's: the code of its trainers, on the same log-probabilities. Runs in .trl/ (install_trl.sh).

TRL's loss functions are methods that take a model. Here they get a model that returns given log-probabilities, so that all
options can be compared quickly, values and gradients.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.schema.align import DpoConfig, GrpoConfig
from train.align.losses.policy import Answers, group_advantages, policy_loss
from train.align.losses.preference import (
    PairLogProbs,
    bradley_terry_losses,
    dpo_loss,
    ranked_pairs,
    ranking_loss,
)

pytestmark = pytest.mark.oracle
VALUES, GRADIENTS = {"rtol": 0, "atol": 1e-6}, {"rtol": 0, "atol": 1e-5}


def accelerator() -> Any:
    same = {name: lambda x, **_: x for name in ("gather", "gather_for_metrics", "reduce", "unwrap_model")}
    return SimpleNamespace(device=torch.device("cpu"), num_processes=1, sync_gradients=True, **same)


class Metrics(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        return self.setdefault(key, [])


def metrics() -> dict[str, Any]:
    return {"train": Metrics(), "eval": Metrics()}


def log_probs(*shape: int, seed: int) -> torch.Tensor:
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def trl_dpo(kind: list[str], weights: list[float], beta: float, smoothing: float, masks: torch.Tensor) -> Any:
    """(loss of TRL, gradient, our pairs) for 2N rows of token log-probabilities; masks: [2N, T + 1]."""
    from trl import DPOTrainer

    count = masks.shape[1] - 1
    token_logps = (log_probs(len(masks), count, seed=1) * masks[:, 1:]).requires_grad_()
    reference = log_probs(len(masks), count, seed=2) * masks[:, 1:]

    def model(values: torch.Tensor) -> Any:
        none = torch.zeros_like(values)
        return lambda **_: SimpleNamespace(
            log_probs=values, entropy=none, mean_logits=none, is_top1=none.bool(), log_sum_sq_probs=none
        )

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False, is_gradient_checkpointing=False), accelerator=accelerator(),
        aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=False, ref_model=model(reference), f_divergence_type="reverse_kl", loss_types=kind,
        loss_weights=weights, beta=beta, label_smoothing=smoothing, use_weighting=False, _metrics=metrics(),
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None), _total_train_tokens=0,
    )  # fmt: skip
    inputs = {"input_ids": torch.zeros_like(masks), "completion_mask": masks, "attention_mask": torch.ones_like(masks)}
    loss = DPOTrainer._compute_loss(trainer, model(token_logps), inputs, False)
    loss.backward()
    half = len(masks) // 2
    ours = token_logps.detach().clone().requires_grad_()
    sums, reference_sums, counts = ours.sum(1), reference.sum(1), masks.sum(1)
    pairs = PairLogProbs(
        sums[:half], sums[half:], reference_sums[:half], reference_sums[half:], counts[:half], counts[half:]
    )
    return loss.detach(), token_logps.grad, pairs, ours


MASKS = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "weights", "options"),
    [
        (["sigmoid"], [1.0], DpoConfig(beta=0.1)),
        (["sigmoid_norm"], [1.0], DpoConfig(beta=2.0, length_normalized=True)),
        (["sigmoid", "sft"], [1.0, 0.3], DpoConfig(beta=0.5, sft_weight=0.3)),
    ],
)
def test_dpo(kind: list[str], weights: list[float], options: DpoConfig) -> None:
    loss, gradient, pairs, leaf = trl_dpo(kind, weights, options.beta, 0.0, MASKS)
    found = dpo_loss(pairs, options, step_pairs=2, step_chosen_tokens=int(MASKS[:2].sum()))
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), loss, **VALUES)
    torch.testing.assert_close(leaf.grad * MASKS[:, 1:], gradient * MASKS[:, 1:], **GRADIENTS)


def test_label_smoothing() -> None:
    """TRL smooths the sigmoid loss only under the name `aot`, which for one pair is the same."""
    one = MASKS[[0, 2]]
    options = DpoConfig(beta=0.7, label_smoothing=0.2)
    loss, gradient, pairs, leaf = trl_dpo(["aot"], [1.0], 0.7, 0.2, one)
    found = dpo_loss(pairs, options, step_pairs=1, step_chosen_tokens=3)
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), loss, **VALUES)
    torch.testing.assert_close(leaf.grad * one[:, 1:], gradient * one[:, 1:], **GRADIENTS)


@pytest.mark.parametrize(("margin", "center"), [(False, None), (False, 0.02), (True, None), (True, 0.01)])
def test_reward_model(margin: bool, center: float | None) -> None:
    from trl import RewardTrainer

    rewards = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.3, -0.5], requires_grad=True)
    leaf = rewards.detach().clone().requires_grad_()
    margins = torch.tensor([0.0, 0.5, 1.0])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator(), _metrics=metrics(), _total_train_tokens=0,
        args=SimpleNamespace(center_rewards_coefficient=center),
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(6, 2)} | ({"margin": margins} if margin else {})

    def model(**_: Any) -> Any:
        return SimpleNamespace(logits=rewards[:, None])

    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    if margin:
        losses = bradley_terry_losses(leaf[:3], leaf[3:], margin_N=margins, center_weight=center or 0.0)
        found = losses.sum() / 3
    else:
        pairs = ranked_pairs(torch.stack([leaf[:3], leaf[3:]], dim=1), torch.tensor([[0, 1]] * 3))
        found = ranking_loss(pairs, step_contexts=3, center_weight=center or 0.0)
    found.backward()
    torch.testing.assert_close(found, loss, **VALUES)
    torch.testing.assert_close(leaf.grad, rewards.grad, **GRADIENTS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dapo", GrpoConfig(kl_weight=0.0)),
        ("dapo", GrpoConfig(clip_high=0.28, kl_weight=0.04)),
        ("grpo", GrpoConfig(mean_over="answers", kl_weight=0.1)),
        ("grpo", GrpoConfig(mean_over="answers", ratio="sequence", clip_low=0.05, clip_high=0.08, kl_weight=0.0)),
        ("bnpo", GrpoConfig(ratio="sequence", clip_low=0.05, clip_high=0.08, kl_weight=0.1)),
        ("dapo", GrpoConfig(importance_cap=1.1, kl_weight=0.04)),
    ],
)
def test_grpo(kind: str, options: GrpoConfig) -> None:
    from trl import GRPOTrainer

    mask = torch.arange(6)[None] < torch.tensor([6, 2, 4, 1])[:, None]
    policy = log_probs(4, 6, seed=3).requires_grad_()
    leaf = policy.detach().clone().requires_grad_()
    old, reference, sampler = (policy.detach() + 0.2 * (log_probs(4, 6, seed=s) + 1.5) for s in (4, 5, 6))
    advantages = torch.tensor([1.2, -0.8, 0.5, -1.0])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator(), _metrics=metrics(), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=options.ratio,
        beta=options.kl_weight, loss_type=kind, epsilon_low=options.clip_low, epsilon_high=options.clip_high,
        use_vllm=options.importance_cap is not None, vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False, max_completion_length=6, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros(4, 6), None),
    )  # fmt: skip
    ids = torch.zeros(4, 6, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if options.importance_cap is not None:  # as GRPOTrainer computes it for `token_truncate`
        inputs["importance_sampling_ratio"] = torch.exp(old - sampler).clamp(max=options.importance_cap)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    answers = Answers(leaf, old, mask, advantages, reference, sampler)
    found = policy_loss(answers, options, step_tokens=int(mask.sum()), step_answers=4)
    found.loss.backward()
    torch.testing.assert_close(found.loss, loss, **VALUES)
    torch.testing.assert_close(leaf.grad, policy.grad, **GRADIENTS)


def test_advantages() -> None:
    """GRPO's and, with the others as the baseline, RLOO's, as their trainers compute them."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.3, 0.3, 0.9, 0.1])
    groups = rewards.view(2, 4)
    # trl/trainer/grpo_trainer.py, scale_rewards="group"
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(groups), expected, **VALUES)
    # trl/trainer/rloo_trainer.py
    baseline = (groups.sum(1, keepdim=True) - groups) / 3
    torch.testing.assert_close(
        group_advantages(groups, leave_one_out=True, normalize=False), groups - baseline, **VALUES
    )
