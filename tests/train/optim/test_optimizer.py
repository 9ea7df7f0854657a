"""AdamW against its formula in float64, weight-decay exclusions, and the optimizer inside Megatron's."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import engine_of, microbatches, recipe_with

from recipes.schema.optim import ParameterGroupConfig
from recipes.schema.parameter_groups import parameter_names
from recipes.schema.recipe import Recipe
from train.engine import run_schedule
from train.model.initial import global_names
from train.optim.optimizer import GroupStepAdamW, set_learning_rate

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


def test_updates_follow_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(50, generator=g), torch.randn(4, 50, generator=g)
    p = torch.nn.Parameter(start.clone())
    optimizer = GroupStepAdamW([p], lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    optimizer.state[p] = {"exp_avg": torch.zeros(50), "exp_avg_sq": torch.zeros(50)}
    x, m, v = start.double(), torch.zeros(50).double(), torch.zeros(50).double()
    for t, grad in enumerate(grads.double(), start=1):
        p.grad = grad.float()
        optimizer.step()
        m = BETAS[0] * m + (1 - BETAS[0]) * grad
        v = BETAS[1] * v + (1 - BETAS[1]) * grad**2
        x = x * (1 - LR * DECAY) - LR * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    torch.testing.assert_close(p.detach().double(), x, rtol=1e-6, atol=1e-7)
    assert optimizer.param_groups[0]["step"] == 4


def one_update(rank: int) -> dict[str, tuple[float, bool, int]]:
    """Per parameter: error of the first update against the formula, whether it was decayed, its dimensions."""
    recipe = recipe_with(**{"optim.weight_decay": 0.5, "optim.clip_norm": 0.5})
    with engine_of(recipe, rank=rank, world=1) as engine:
        chunk = engine.chunks[0]
        before = {n: p.detach().double().clone() for n, p in chunk.module.named_parameters()}
        chunk.zero_grad_buffer()
        engine.optimizer.zero_grad()
        run_schedule(engine, microbatches(recipe, engine.mesh, 0), forward_step=engine.forward_step)
        grads = {n: p.main_grad.double().clone() for n, p in chunk.module.named_parameters()}
        norm = torch.sqrt(sum((g**2).sum() for g in grads.values()))
        set_learning_rate(engine.optimizer, LR)
        _, reported, _ = engine.optimizer.step()
        assert abs(float(reported) / float(norm) - 1) < 1e-6
        found = {}
        for name, p in chunk.module.named_parameters():
            grad = grads[name] * (0.5 / (norm + 1e-6))
            step = LR * grad / (grad.abs() + 1e-8)  # Adam's first step: m and v corrected are the gradient itself
            plain, decayed = before[name] - step, before[name] * (1 - LR * 0.5) - step
            errors = [float((p.detach().double() - expected).abs().max()) for expected in (plain, decayed)]
            found[name] = (min(errors), errors[1] < errors[0], p.dim())
        return found


def test_matrices_are_decayed_and_nothing_else_is() -> None:
    for name, (error, decayed, dims) in run_ranks(1, one_update)[0].items():
        if name.endswith("mixer.D") or "norm" in name or dims > 1 or name.endswith(("A_log", "dt_bias", "conv1d_bias")):
            assert error < 2e-5, name
            assert decayed == (dims > 1), name


GROUPS = (
    ParameterGroupConfig("embedding.*", lr_factor=0.1, weight_decay=0.0),
    ParameterGroupConfig("*.mixer.A_log", weight_decay=0.25),
    ParameterGroupConfig("decoder.layers.1.*", lr_factor=0.0),
    ParameterGroupConfig("decoder.layers.*", lr_factor=2.0),
)
RATES = {
    "embedding.word_embeddings.weight": (0.1, 0.0),
    "decoder.layers.0.mixer.A_log": (1.0, 0.25),
    "decoder.layers.0.mixer.D": (2.0, 0.0),
    "decoder.layers.0.mixer.in_proj.weight": (2.0, 0.5),
    "decoder.layers.1.mlp.linear_fc1.weight": (0.0, 0.5),
    "decoder.layers.9.mlp.linear_fc2.weight": (2.0, 0.5),
    "decoder.final_norm.weight": (1.0, 0.0),
    "output_layer.weight": (1.0, 0.5),
}
"""(factor of the learning rate, weight decay) by hand, of some parameters."""


def grouped_updates(rank: int, recipe: Recipe, world: int) -> dict[str, tuple[float, float]]:
    """Of the parameters of RATES on this rank: the largest difference of their first update to plain AdamW with these rates, and
    the largest part of the update."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        named = {name: p for chunk in engine.chunks for name, p in global_names(chunk.module) if name in RATES}
        before = {name: p.detach().clone() for name, p in named.items()}
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        engine.optimizer.zero_grad()
        run_schedule(engine, microbatches(recipe, engine.mesh, 0), forward_step=engine.forward_step)
        grads = {name: p.main_grad.clone() for name, p in named.items()}
        set_learning_rate(engine.optimizer, LR)
        engine.optimizer.step()
        found = {}
        for name, p in named.items():
            factor, decay = RATES[name]
            plain = torch.nn.Parameter(before[name].clone())
            plain.grad = grads[name]
            torch.optim.AdamW([plain], lr=LR * factor, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay).step()
            found[name] = (float((p - plain).abs().max()), float((p - before[name]).abs().max()))
        return found


def test_groups_have_rates_of_their_own() -> None:
    """As plain AdamW with the group's rates; each pipeline rank finds its layers by their numbers in the whole model."""
    changes = {"optim.weight_decay": 0.5, "optim.clip_norm": 0.0, "optim.groups": GROUPS, "parallel.pipeline": 2}
    found: dict[str, tuple[float, float]] = {}
    for of_rank in run_ranks(2, grouped_updates, recipe_with(**changes), 2):
        found |= of_rank
    assert found.keys() == RATES.keys()
    for name, (error, moved) in found.items():
        assert error < 1e-6, name
        assert (moved == 0) == (RATES[name][0] == 0), name


def names_of(rank: int, recipe: Recipe) -> list[str]:
    with engine_of(recipe, rank=rank, world=1) as engine:
        return [name for chunk in engine.chunks for name, _ in global_names(chunk.module)]


@pytest.mark.parametrize(
    "changes",
    [
        {"model.pattern": "ME*-", "model.experts.count": 4, "model.experts.shared_ffn": 32, "model.experts.latent": 32},
        {"model.pattern": "w-", "model.post_norms": True, "model.tie_embeddings": True},
        {"model.pattern": "M-", "model.mtp.depths": 2, "model.mtp.pattern": "*ME", "model.experts.count": 4},
        {"model.pattern": "M-", "model.mtp.depths": 2, "model.mtp.repeated": True},
    ],
)
def test_names_of_the_rules_are_those_of_the_model(changes: dict[str, Any]) -> None:
    recipe = recipe_with(**changes)
    assert sorted(run_ranks(1, names_of, recipe)[0]) == sorted(parameter_names(recipe.model))
