"""Distillation on chats: the teacher is matched on the learned labels of a step and nowhere else, at every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from teachers import TEACHER, distill_tiny, save_teacher, student_of
from tiny import Numbers, engine_of, masked_rows, microbatches, with_fields
from torch.nn import functional as F

from data.batch import Batch
from recipes.schema.recipe import Recipe
from train.model.context import RowContext
from train.record.stopwatch import Stopwatch
from train.step import train_step

RESET = {"data.reset_at_documents": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "CP2": (2, {"objective.teacher_tensor": 1, "parallel.context": 2}),
    "TP2 with sequence parallelism, PP2": (
        4,
        {"objective.teacher_tensor": 1, "parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2},
    ),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), with_fields(TEACHER, RESET))


def some_rows_unlearned(step: int, positions: np.ndarray) -> Batch:
    """`masked_rows`; in the second step a whole microbatch has nothing to learn."""
    rows = masked_rows(step, positions)
    assert rows.learned is not None
    keep = torch.from_numpy((positions != 1) | (step != 1))
    return replace(rows, learned=rows.learned & keep[:, None])


@pytest.fixture(scope="module")
def mixed(teacher: Path) -> Recipe:
    changes = {"objective.next_token_weight": 0.3, "objective.hidden_match": "mse", "objective.chunk_tokens": 24}
    return student_of(teacher, **RESET, **changes)


@pytest.fixture(scope="module")
def alone(mixed: Recipe) -> Numbers:
    return run_ranks(1, distill_tiny, mixed, 1, 2, some_rows_unlearned)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_matches_the_teacher_on_the_same_labels(name: str, mixed: Recipe, alone: Numbers) -> None:
    world, changes = LAYOUTS[name]
    for numbers in run_ranks(world, distill_tiny, with_fields(mixed, changes), world, 2, some_rows_unlearned):
        assert numbers.losses == pytest.approx(alone.losses, rel=2e-6)
        assert numbers.grad_norms == pytest.approx(alone.grad_norms, rel=2e-5)


def logits_of(rank: int, recipe: Recipe) -> torch.Tensor:
    """Plain logits of a model for the rows of the first step."""
    rows, found = masked_rows(0, np.arange(4)), []
    with engine_of(recipe, rank=rank, world=1) as engine, torch.no_grad():
        assert rows.document_index is not None
        for row in range(4):
            positions = torch.arange(rows.tokens.shape[1]).expand(1, -1)
            context = RowContext(documents=rows.document_index[row : row + 1])
            found.append(
                engine.chunks[0].module(rows.tokens[row : row + 1], positions, None, packed_seq_params=context)[0]
            )
    return torch.stack(found)


def first_step(rank: int, recipe: Recipe) -> list[float]:
    """Loss and parts of a first step, with and without the mask."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        rows = microbatches(recipe, engine.mesh, 0, rows=masked_rows)
        ours, unmasked = (
            train_step(engine, batches, step=0, learning_rate=0.0, watch=Stopwatch())
            for batches in (rows, [replace(batch, learned=None) for batch in rows])
        )
    return [float(ours.loss), *ours.parts.tolist()[:2], float(unmasked.loss)]


def test_the_loss_is_the_textbooks_over_the_learned_labels(teacher: Path) -> None:
    recipe = student_of(teacher, **RESET, **{"objective.next_token_weight": 0.25})
    (student,), (taught,) = run_ranks(1, logits_of, recipe), run_ranks(1, logits_of, with_fields(TEACHER, RESET))
    rows = masked_rows(0, np.arange(4))
    log_q, log_p = (F.log_softmax(z.double(), dim=-1)[rows.learned] for z in (student, taught))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    next_token = float(F.nll_loss(log_q, rows.labels[rows.learned]))
    loss, *parts, unmasked = run_ranks(1, first_step, recipe)[0]
    assert parts == pytest.approx([divergence, next_token], rel=2e-6)
    assert loss == pytest.approx(divergence + 0.25 * next_token, rel=2e-6)
    assert abs(unmasked - loss) > 1e-4, "without the mask the loss is another"
