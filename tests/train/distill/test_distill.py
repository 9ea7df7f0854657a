"""Distillation end to end: its loss against plain float64 formulas on both models' logits, and equal at every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from teachers import TEACHER, distill_tiny, save_teacher, student_of
from tiny import Numbers, engine_of, microbatches
from torch.nn import functional as F

from recipes.schema.recipe import Recipe
from train.engine import run_schedule

WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "teacher TP2, student DP2": (2, {"objective.teacher_tensor": 2}),
    "teacher TP1, student TP2 with sequence parallelism": (
        2,
        {"objective.teacher_tensor": 1, "parallel.tensor": 2, "parallel.sequence": True},
    ),
    "teacher TP1, student CP2": (2, {"objective.teacher_tensor": 1, "parallel.context": 2}),
    "teacher TP1, student TP2 x PP2": (
        4,
        {"objective.teacher_tensor": 1, "parallel.tensor": 2, "parallel.pipeline": 2, "run.microbatch_rows": 1},
    ),
}
MIXED = {
    "objective.next_token_weight": 0.3,
    "objective.temperature": 1.5,
    "objective.hidden_match": "mse",
    "run.microbatch_rows": 2,
    "objective.chunk_tokens": 24,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def alone(teacher: Path) -> Numbers:
    return run_ranks(1, distill_tiny, student_of(teacher, **MIXED), 1)[0]


@pytest.mark.parametrize("case", WORLDS)
def test_every_layout_of_both_models_trains_the_same(case: str, teacher: Path, alone: Numbers) -> None:
    world, changes = WORLDS[case]
    for numbers in run_ranks(world, distill_tiny, student_of(teacher, **{**MIXED, **changes}), world):
        np.testing.assert_allclose(numbers.losses, alone.losses, rtol=2e-6)
        np.testing.assert_allclose(numbers.grad_norms, alone.grad_norms, rtol=2e-5)


def test_the_loss_is_the_textbooks_on_both_models_logits(teacher: Path) -> None:
    recipe = student_of(teacher, **{"objective.next_token_weight": 0.25, "objective.temperature": 2.0})
    (student_logits, labels, report), (teacher_logits, _, _) = (
        run_ranks(1, logits_and_loss, recipe)[0],
        run_ranks(1, logits_and_loss, TEACHER)[0],
    )
    log_q, log_p = (F.log_softmax(z.double() / 2.0, dim=-1) for z in (student_logits, teacher_logits))
    divergence = 4.0 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    next_token = F.cross_entropy(student_logits.double().flatten(0, 1), labels.flatten())
    loss, *parts = report.tolist()
    assert parts[:2] == pytest.approx([float(divergence), float(next_token)], rel=2e-6)
    assert loss == pytest.approx(float(divergence + 0.25 * next_token), rel=2e-6)
    assert float(divergence) > 0.05, "teacher and student must differ for this to prove anything"


def logits_and_loss(rank: int, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain logits of a model's first microbatch, its labels, and what its objective reports for it."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        batch = microbatches(recipe, engine.mesh, 0)[0]
        chunk = engine.chunks[0].module
        positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        with torch.no_grad():
            logits = chunk(batch.tokens, positions, None)
        (report,) = run_schedule(engine, [batch], forward_step=engine.forward_step, forward_only=True)
        return logits, batch.labels, report.detach()
