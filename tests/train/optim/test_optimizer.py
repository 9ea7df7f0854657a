"""AdamW against its formula in float64, weight-decay exclusions, and the optimizer inside Megatron's."""

import torch
from ranks import run_ranks
from tiny import engine_of, microbatches, recipe_with

from train.engine import run_schedule
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
