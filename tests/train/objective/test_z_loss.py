"""The z-loss against its formula in float64 on whole logits, and at layouts that divide the logits."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import engine_of, masked_rows, microbatches, recipe_with
from torch.nn import functional as F

from recipes.schema.recipe import Recipe
from train.record.stopwatch import Stopwatch
from train.step import train_step

Z = 0.01
MODEL: dict[str, Any] = {
    "model.pattern": "M*-", "model.logit_softcap": 3.0, "model.init_std": 0.1, "objective.z_loss": Z, "optim.clip_norm": 0.0,
}  # fmt: skip


def steps(rank: int, recipe: Recipe, world: int) -> list[tuple[float, float, float]]:
    """Two steps on rows with masked labels. -> each step's (loss, z-loss, gradient norm); first, in one process, the formula."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        assert engine.loss_parts == ("z_loss",)
        found = []
        if world == 1:
            found.append(by_formula(engine, recipe))
        for step in range(2):
            rows = microbatches(recipe, engine.mesh, step, rows=masked_rows)
            result = train_step(engine, rows, step=step, learning_rate=1e-2, watch=Stopwatch())
            terms = engine.mesh.sum_over_world(torch.cat([result.loss[None], result.parts]))
            found.append((*terms.tolist(), float(result.grad_norm)))
        return found


def by_formula(engine: Any, recipe: Recipe) -> tuple[float, float, float]:
    """The first step by torch, on the model's logits: one sum over all learned labels."""
    (chunk,) = engine.chunks
    model = chunk.module
    terms = torch.zeros(2)
    count = 0
    for batch in microbatches(recipe, engine.mesh, 0, rows=masked_rows):
        positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        logits = model(batch.tokens, positions, None)  # [rows, sequence, vocabulary], after the soft cap
        losses = F.cross_entropy(logits.flatten(0, 1).double(), batch.labels.flatten(), reduction="none")
        squares = logits.double().logsumexp(-1).flatten() ** 2
        learned = batch.learned.flatten()
        terms = terms + torch.stack([losses[learned].sum(), Z * squares[learned].sum()])
        count += int(learned.sum())
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((terms / count).sum(), parameters)
    norm = torch.stack([g.double().norm() for g in gradients]).norm()
    return (*(terms / count).tolist(), float(norm))


@pytest.fixture(scope="module")
def alone() -> list[tuple[float, float, float]]:
    return run_ranks(1, steps, recipe_with(**MODEL), 1)[0]


def test_z_loss_is_that_of_the_formula(alone: list[tuple[float, float, float]]) -> None:
    formula, first, _ = alone
    assert first == pytest.approx(formula, rel=2e-6)
    assert formula[1] > 0.1, "large enough to matter"


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"parallel.pipeline": 2}),
        pytest.param(2, {"parallel.context": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel.tensor": 2, "parallel.sequence": True}, marks=pytest.mark.slow),
    ],
)
def test_z_loss_is_the_same_at_every_layout(
    world: int, layout: dict[str, Any], alone: list[tuple[float, float, float]]
) -> None:
    found = run_ranks(world, steps, recipe_with(**MODEL, **layout), world)[0]
    for ours, theirs in zip(found, alone[1:], strict=True):
        assert ours == pytest.approx(theirs, rel=3e-6)
