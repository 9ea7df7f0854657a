"""Supervised fine-tuning: the loss of a step is the mean over all labels that are learned in it, at every layout.

Microbatches differ widely in how many labels are learned (1 to all), so a mean of their means is another number.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import ROW_TOKENS, Numbers, engine_of, masked_rows, microbatches, recipe_with

from data.batch import Batch
from recipes.schema.errors import DataError
from recipes.schema.recipe import Recipe
from train.engine import Engine
from train.evaluate.losses import heldout_bits_per_byte
from train.model.context import RowContext
from train.record.stopwatch import Stopwatch
from train.step import train_step

ROUNDING = 2e-6  # test_layouts_agree
CHATS = {"data.reset_at_documents": True}
LAYOUTS = {
    "microbatch of 2": (1, {"run.microbatch_rows": 2}),
    "DP2": (2, {}),
    "DP2 overlapped": (2, {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}),
    "TP2 SP": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "CP2": (2, {"parallel.context": 2}),
    "TP2 SP CP2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2}),
    "DP2 PP2": (4, {"parallel.pipeline": 2}),
}


def nats_of(engine: Engine, rows: Batch) -> torch.Tensor:
    """Loss of every label by torch's own cross-entropy, [rows, tokens] float64."""
    positions = torch.arange(ROW_TOKENS).expand(1, -1)
    found = []
    for row in range(len(rows.labels)):
        assert rows.document_index is not None
        context = RowContext(documents=rows.document_index[row : row + 1])
        with torch.no_grad():
            logits = engine.chunks[0](rows.tokens[row : row + 1], positions, None, packed_seq_params=context)
        found.append(torch.nn.functional.cross_entropy(logits[0].double(), rows.labels[row], reduction="none"))
    return torch.stack(found)


def step_of(engine: Engine, rows: list[Batch], step: int) -> tuple[float, float]:
    """(loss, gradient norm) of a step."""
    result = train_step(engine, rows, step=step, learning_rate=1e-3, watch=Stopwatch())
    return float(engine.mesh.sum_over_world(result.loss.clone())), float(result.grad_norm)


def train(rank: int, recipe: Recipe, world: int) -> tuple[Numbers, float]:
    """Three steps, and what the loss of the first should be (of one process only)."""
    expected = 0.0
    with engine_of(recipe, rank=rank, world=world) as engine:
        if world == 1:
            rows = masked_rows(0, np.arange(4))
            expected = float(nats_of(engine, rows)[rows.learned].mean())
        numbers = [
            step_of(engine, microbatches(recipe, engine.mesh, step, rows=masked_rows), step) for step in range(3)
        ]
    return Numbers([loss for loss, _ in numbers], [norm for _, norm in numbers]), expected


def trained(world: int, **changes: object) -> tuple[Numbers, float]:
    results = run_ranks(world, train, recipe_with(**CHATS, **changes), world)
    assert all(result[0] == results[0][0] for result in results)
    return results[0]


@pytest.fixture(scope="module")
def single() -> tuple[Numbers, float]:
    return trained(1)


def test_loss_is_the_mean_over_the_learned_labels_of_the_step(single: tuple[Numbers, float]) -> None:
    numbers, expected = single
    assert numbers.losses[0] == pytest.approx(expected, rel=ROUNDING)


SLOW = ("DP2 overlapped", "TP2 SP CP2")
"""Run by `make test-slow` only: test_dpo and the other layouts fail with them."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_layout_learns_the_same_labels_as_one_process(name: str, single: tuple[Numbers, float]) -> None:
    world, changes = LAYOUTS[name]
    numbers, _ = trained(world, **changes)
    assert numbers.losses == pytest.approx(single[0].losses, rel=ROUNDING)
    assert numbers.grad_norms == pytest.approx(single[0].grad_norms, rel=ROUNDING)


def without_learning(rank: int, recipe: Recipe) -> list[tuple[float, float]]:
    """Loss and gradient norm of a first step: of the rows, with other labels where none is learned, and without a mask."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        found, rows = [], masked_rows(0, np.arange(4))
        assert rows.learned is not None
        others = torch.where(rows.learned, rows.labels, (rows.labels + 1) % 256)
        for variant in (rows, replace(rows, labels=others), replace(rows, learned=None)):
            parts = [variant.part(row, row + 1) for row in range(4)]
            result = train_step(engine, parts, step=0, learning_rate=0.0, watch=Stopwatch())
            found.append((float(result.loss), float(result.grad_norm)))
    return found


def test_labels_that_are_not_learned_change_nothing_and_a_missing_mask_shows() -> None:
    ours, others, broken = run_ranks(1, without_learning, recipe_with(**CHATS))[0]
    assert ours == others
    assert abs(broken[0] - ours[0]) > 1e-3 and abs(broken[1] / ours[1] - 1) > 0.1


def nothing_learned(rank: int, recipe: Recipe) -> tuple[str, bool]:
    """What a step without a learned label says, and whether the weights are as they were."""
    with engine_of(recipe, rank=rank, world=2) as engine:
        before = [parameter.detach().clone() for parameter in engine.chunks[0].parameters()]
        rows = microbatches(recipe, engine.mesh, 0, rows=masked_rows)
        rows = [replace(row, learned=torch.zeros_like(row.labels, dtype=torch.bool)) for row in rows]
        try:
            train_step(engine, rows, step=6, learning_rate=1e-3, watch=Stopwatch())
        except DataError as error:
            after = engine.chunks[0].parameters()
            return str(error), all(map(torch.equal, before, after))
    return "", False


def test_a_step_without_a_learned_label_is_named_on_every_rank() -> None:
    for message, is_unchanged in run_ranks(2, nothing_learned, recipe_with(**CHATS)):
        assert message.startswith("step 7 has no label that is learned") and is_unchanged


def heldout(rank: int, recipe: Recipe) -> tuple[float, float]:
    """Bits per byte of held-out chats: ours, and from torch's cross-entropy of the answers alone."""
    rows, token_bytes = masked_rows(0, np.arange(4)), np.arange(256, dtype=np.int32) % 5
    dataset = SimpleNamespace(
        source_names=["chats"],
        tokenizer=SimpleNamespace(token_bytes=lambda: token_bytes),
        heldout_count=lambda name: 4,
        heldout_rows=lambda name, start, count: rows.part(start, start + count),
    )
    with engine_of(recipe, rank=rank, world=1) as engine:
        ours = heldout_bits_per_byte(engine, dataset, rows_per_source=4)["chats"]
        bits = float(nats_of(engine, rows)[rows.learned].sum()) / np.log(2)
    return ours, bits / int(token_bytes[rows.labels[rows.learned].numpy()].sum())


def test_heldout_loss_is_of_answers_only() -> None:
    ours, expected = run_ranks(1, heldout, recipe_with(**CHATS))[0]
    assert ours == pytest.approx(expected, rel=ROUNDING)
