"""GRPO against TRL 1.16 and transformers, other implementations: the same loss and the same gradients on the same weights, of
answers that our engine drew. TRL's loss gets each answer alone, unpacked; ours gets packed rows.

Run by `make test-oracle`, in .trl (install_trl.sh).
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parity.peers import peer_of, their_part
from policy_runs import policy_recipe, policy_stream, prompts_in
from ranks import run_ranks
from test_trl import accelerator, metrics
from test_trl_sft import MODELS
from tiny import engine_of

from recipes.schema.recipe import Recipe
from train.align.policy_stream import Drawn
from train.engine import run_schedule

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.oracle

TEMPERATURE = 0.8
CLIP = {"token": 0.2, "sequence": 0.03}
"""A ratio of a sequence is a mean, so it moves less."""


def log_probs_of(
    peer: Any, input_ids: torch.Tensor, _mask: torch.Tensor, logits_to_keep: int, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """As TRL's method, with transformers' logits."""
    every = torch.log_softmax(peer(input_ids).logits[:, :-1].float() / TEMPERATURE, dim=-1)
    found = every.gather(-1, input_ids[:, 1:, None])[..., 0][:, -logits_to_keep:]
    return found, torch.zeros_like(found), None


def their_loss(
    peer: Any, batch: Drawn, prompts: list[list[int]], advantages: torch.Tensor, recipe: Recipe
) -> torch.Tensor:
    """The sum over answers of TRL's loss; gradients are left in the peer."""
    config = recipe.objective.grpo
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator(), _metrics=metrics(), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=config.ratio,
        beta=config.kl_weight, loss_type="dapo", epsilon_low=config.clip_low, epsilon_high=config.clip_high,
        use_vllm=False, _entropy_bonus_enabled=False, max_completion_length=8, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=log_probs_of,
    )  # fmt: skip
    items = torch.tensor(sum(len(answer.tokens) for answer in batch.answers))
    total = torch.zeros(())
    assert batch.reference is not None
    for number, answer in enumerate(batch.answers):
        prompt, completion = torch.tensor([prompts[number]]), torch.from_numpy(answer.tokens)[None]
        inputs = {
            "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": completion,
            "completion_mask": torch.ones_like(completion), "advantages": advantages[number : number + 1],
            "old_per_token_logps": torch.from_numpy(batch.old[number])[None],
            "ref_per_token_logps": torch.from_numpy(batch.reference[number])[None], "num_items_in_batch": items,
        }  # fmt: skip
        part = trl.GRPOTrainer._compute_loss(trainer, peer, inputs)
        part.backward()
        total = total + part.detach()
    return total


def compare(rank: int, recipe: Recipe) -> dict[str, float]:
    """Difference of the loss, and relative difference of every gradient."""
    peer, found = peer_of(recipe.model), {}
    weights = dict(peer.named_parameters())
    with engine_of(recipe, rank=rank, world=1) as engine:
        ours = engine.chunks[0].module
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(their_part(name, weights, recipe.model))
        without = replace(
            recipe, objective=replace(recipe.objective, grpo=replace(recipe.objective.grpo, kl_weight=0.0))
        )
        with policy_stream(engine, without) as (stream, _):
            next(stream)
            batch, draw = stream._batch, np.random.default_rng(1)
            assert batch is not None
            # Other policies than this one, so that ratios are clipped and the divergence is not 0.
            moved = [[x + draw.normal(0, 0.2, len(x)).astype(np.float32) for x in batch.drawn] for _ in range(2)]
            stream._batch = batch = replace(batch, old=moved[0], reference=moved[1])
            rows = stream._microbatches(stream._parts[0])
            prompts = [list(request.context) for request in stream._parts[0].requests]
        engine.chunks[0].zero_grad_buffer()
        reports = run_schedule(engine, rows, forward_step=engine.forward_step)
        gaps = batch.rewards - batch.rewards.mean(1, keepdim=True)
        advantages = (gaps / (batch.rewards.std(1, keepdim=True) + 1e-4)).reshape(-1).float()
        theirs = their_loss(peer, batch, prompts, advantages, recipe)
        report = torch.stack(reports).mean(0)
        assert report[2] > 0 and report[3] > 0, "no ratio is clipped"
        found["loss"] = abs(float(report[0]) - float(theirs))
        gradients = {name: p.grad for name, p in weights.items()}
        for name, parameter in ours.named_parameters():
            wanted = their_part(name, gradients, recipe.model)
            found[name] = float((parameter.main_grad - wanted).abs().max() / wanted.abs().max())
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_loss_and_gradients_are_those_of_trl(tmp_path: Path, name: str, ratio: str) -> None:
    prompts_in(tmp_path)
    model = replace(MODELS[name], vocab=400)
    options = {
        "objective.grpo.kl_weight": 0.1,
        "objective.grpo.temperature": TEMPERATURE,
        "objective.grpo.ratio": ratio,
        "objective.grpo.clip_low": CLIP[ratio],
        "objective.grpo.clip_high": CLIP[ratio],
    }
    found = run_ranks(1, compare, policy_recipe(tmp_path, model=model, **options))[0]
    assert found.pop("loss") < 1e-6
    assert max(found.values()) < 1e-5, found
