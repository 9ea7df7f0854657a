"""Reward models: the loss of a step is Bradley-Terry's mean over its contexts, at every layout; it learns, and with a wrong sign
it does not; a language model is a start, with a new head."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_models import MIXTURE
from preference_rows import batch_of, drawn_rows, preference_row
from ranks import run_ranks
from tiny import GEMMA, ROW_TOKENS, engine_of, recipe_with

import train.align.reward
from data.batch import Batch
from recipes.schema.errors import RecipeError
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from train.align.losses.preference import RankedPairs, ranking_loss
from train.align.reward import REWARD_PARTS, answer_places, pairs_of
from train.build import build_engine, check, mesh_of
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.engine import Engine
from train.evaluate.deal import evaluating
from train.model.context import RowContext
from train.model.initial import HEAD, global_names
from train.record.stopwatch import Stopwatch
from train.step import train_step

ROUNDING = 2e-6  # test_layouts_agree
REWARD: dict[str, Any] = {"model.head": "scalar", "objective.kind": "reward", "data.reset_at_documents": True}
OVERLAP = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
LAYOUTS = {
    "microbatch of 2": (1, {"run.microbatch_rows": 2}),
    "DP2 overlapped": (2, OVERLAP),
    "TP2": (2, {"parallel.tensor": 2}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "CP2": (2, {"parallel.context": 2}),
    "TP2 SP CP2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2}),
}
Numbers = list[tuple[float, float, list[float]]]
"""(loss, gradient norm, parts) of each step."""


def step_of(
    engine: Engine, batches: list[Batch], step: int, *, learning_rate: float = 1e-4
) -> tuple[float, float, list[float]]:
    result = train_step(engine, batches, step=step, learning_rate=learning_rate, watch=Stopwatch())
    total = engine.mesh.sum_over_world(torch.cat([result.loss[None], result.parts]))
    return float(total[0]), float(result.grad_norm), total[1:].tolist()


def microbatches(recipe: Recipe, engine: Engine, step: int) -> list[Batch]:
    size, ranks = recipe.run.microbatch_rows, engine.mesh.layout.data
    starts = range(engine.mesh.data_rank * size, recipe.run.global_rows, ranks * size)
    return [drawn_rows(step, np.arange(start, start + size)) for start in starts]


def by_hand(engine: Engine, batch: Batch) -> list[float]:
    """[loss, *REWARD_PARTS] of some rows, context by context in Python's float64, from the rows' arrays alone."""
    model = engine.chunks[0].module
    with evaluating([model]):
        positions = torch.arange(ROW_TOKENS).expand_as(batch.tokens)
        values = model(batch.tokens, positions, None, packed_seq_params=RowContext(documents=batch.document_index))
    contexts: dict[tuple[int, int], list[tuple[int, float]]] = {}
    assert batch.document_index is not None and batch.learned is not None
    assert batch.ranks is not None and batch.groups is not None
    for row in range(len(batch.tokens)):
        for document, (rank, group) in enumerate(
            zip(batch.ranks[row].tolist(), batch.groups[row].tolist(), strict=True)
        ):
            if rank >= 0:
                of_answer = (batch.document_index[row] == document) & batch.learned[row]
                last = int(of_answer.nonzero().max()) + 1  # the input that is the last learned label
                assert batch.tokens[row, last] == batch.labels[row, last - 1]
                contexts.setdefault((row, group), []).append((rank, float(values[row, last])))
    sums = [0.0] * 5
    for answers in contexts.values():
        pairs = [(a, b) for rank, a in answers for other, b in answers if rank < other]
        terms = ([math.log1p(math.exp(b - a)), float(a > b), a, b, a - b] for a, b in pairs)
        for index, values_of in enumerate(zip(*terms, strict=True)):
            sums[index] += sum(values_of) / len(pairs) / len(contexts)
    return sums


def trained_steps(rank: int, recipe: Recipe, world: int) -> tuple[Numbers, list[float]]:
    """Three steps, and what the first should report (of one process only)."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        expected = by_hand(engine, drawn_rows(0, np.arange(4))) if world == 1 else []
        return [step_of(engine, microbatches(recipe, engine, step), step) for step in range(3)], expected


def trained(world: int, **changes: Any) -> tuple[Numbers, list[float]]:
    results = run_ranks(world, trained_steps, recipe_with(**{**REWARD, **changes}), world)
    assert all(result[0] == results[0][0] for result in results)
    return results[0]


@pytest.fixture(scope="module")
def single() -> tuple[Numbers, list[float]]:
    return trained(1)


def test_loss_and_parts_are_the_formula(single: tuple[Numbers, list[float]]) -> None:
    """Rows with one to three contexts, of two answers or four with a tie."""
    (loss, _, parts), expected = single[0][0], single[1]
    assert len(parts) == len(REWARD_PARTS)
    assert [loss, *parts] == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)


SLOW = ("microbatch of 2", "TP2 SP CP2")
"""Run by `make test-slow` only: the others fail with them."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_layout_learns_the_same_as_one_process(name: str, single: tuple[Numbers, list[float]]) -> None:
    world, changes = LAYOUTS[name]
    numbers, _ = trained(world, **changes)
    for found, wanted in zip(numbers, single[0], strict=True):
        assert found[:2] == pytest.approx(wanted[:2], rel=ROUNDING)
        assert found[2] == pytest.approx(wanted[2], rel=ROUNDING, abs=1e-5)


def test_gemma_2_with_tied_embeddings_learns_the_same_at_two_stages() -> None:
    """The recipe's tied embeddings and its cap on logits do not concern a scalar head."""
    (one, expected), (two, _) = trained(1, **GEMMA), trained(2, **GEMMA, **{"parallel.pipeline": 2})
    assert one[0][0] == pytest.approx(expected[0], rel=ROUNDING)
    for found, wanted in zip(two, one, strict=True):
        assert found[:2] == pytest.approx(wanted[:2], rel=ROUNDING)


def test_experts_learn_the_same_on_two_expert_ranks() -> None:
    (one, _), (two, _) = trained(1, **MIXTURE), trained(2, **MIXTURE, **{"parallel.expert": 2})
    for found, wanted in zip(two, one, strict=True):
        assert found[:2] == pytest.approx(wanted[:2], rel=ROUNDING)


def test_answers_that_end_with_their_row_or_document_count_to_their_last_input() -> None:
    row = preference_row([([5, 6, 7], 2, 0, 1), ([5, 8], 1, 0, 0), ([9] * 8, 3, 1, 0), ([9, 1], 1, 1, 2)], 20)
    row["learned"][18:] = [True, True]  # the last answer is cut off by the end of the row
    row["document_index"][6] = 2  # the second answer ends with the token that ends its document
    places = answer_places(batch_of([row, row], np.arange(2)))
    assert places.row.tolist() == [0] * 4 + [1] * 4
    assert places.token.tolist() == [3, 5, 15, 19] * 2
    assert places.context.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and places.slot.tolist() == [0, 1] * 4
    assert places.rank.tolist() == [1, 0, 0, 2] * 2


def taught(rank: int, is_wrong: bool) -> float:
    """Accuracy on other contexts after training on: of two answers, the one that ends with token 7 is better."""

    def rows(seed: int, count: int) -> Batch:
        draw, found = np.random.default_rng(seed), []
        for _ in range(count):
            answers = []
            for group in range(4):
                context = draw.integers(10, 60, 2).tolist()
                answers += [([*context, 7], 1, group, 0), ([*context, int(draw.integers(8, 10))], 1, group, 1)]
            found.append(preference_row(answers, ROW_TOKENS))
        return batch_of(found, np.arange(count))

    if is_wrong:

        def wrong(pairs: RankedPairs, **arguments: Any) -> torch.Tensor:
            return -ranking_loss(pairs, **arguments)

        train.align.reward.ranking_loss = wrong
    recipe = recipe_with(**REWARD, **{"model.pattern": "M-*-"})
    with engine_of(recipe, rank=rank, world=1) as engine:
        for step in range(12):
            step_of(engine, [rows(step, 1)], step, learning_rate=1e-3)
        with evaluating(engine.chunks):
            test = rows(99, 4)
            context = RowContext(documents=test.document_index)
            positions = torch.arange(ROW_TOKENS)
            values = engine.chunks[0](test.tokens, positions.expand(4, -1), None, packed_seq_params=context)
            pairs = pairs_of(test, values, positions, mesh=engine.mesh)
        return float((pairs.better_N > pairs.worse_N).float().mean())


def test_it_learns_which_answer_is_better_and_a_wrong_sign_does_not() -> None:
    assert run_ranks(1, taught, False)[0] >= 0.9
    assert run_ranks(1, taught, True)[0] <= 0.1


def saved_language_model(rank: int, recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    with engine_of(recipe, rank=rank, world=1) as engine:
        state = RunState(step=0, position=0, recipe=recipe_mapping(recipe))
        CheckpointFolder(folder, recipe.checkpoint).save(engine, state)
        return {name: p.detach().clone() for name, p in global_names(engine.chunks[0].module)}


def started(rank: int, recipe: Recipe, world: int, path: Path) -> dict[str, torch.Tensor] | str:
    """Weights at the start from a checkpoint, or the refusal."""
    torch.set_num_threads(1)
    with mesh_of(recipe, check(recipe, world=world), device=torch.device("cpu"), rank=rank) as mesh:
        try:
            engine = build_engine(recipe, mesh, weights=path)
        except RecipeError as error:
            return str(error)
        return {name: p.detach().clone() for chunk in engine.chunks for name, p in global_names(chunk.module)}


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_a_start_and_only_its_head_is_drawn(tied: bool, tmp_path: Path) -> None:
    language = recipe_with(**{"model.tie_embeddings": tied})
    before = run_ranks(1, saved_language_model, language, tmp_path)[0]
    path = tmp_path / "step_00000000"
    reward = recipe_with(**REWARD, **{"model.tie_embeddings": tied})
    (after,) = run_ranks(1, started, reward, 1, path)
    assert after[HEAD].shape == (1, 64) and 0.05 < float(after[HEAD].std()) * math.sqrt(64) < 2
    backbone = after.keys() - {HEAD}
    assert backbone == before.keys() - {HEAD} and all(torch.equal(after[name], before[name]) for name in backbone)
    split = recipe_with(**REWARD, **{"model.tie_embeddings": tied, "parallel.tensor": 2})
    assert all(torch.equal(weights[HEAD], after[HEAD]) for weights in run_ranks(2, started, split, 2, path))
    if not tied:
        other = recipe_with(**REWARD, **{"model.norm_eps": 1e-3})
        assert (
            "model.norm_eps: 1e-05 in the checkpoint, 0.001 in the recipe" in run_ranks(1, started, other, 1, path)[0]
        )
        back = recipe_with(**{"model.head": "vocabulary"})
        again = tmp_path / "reward"
        run_ranks(1, saved_language_model, reward, again)
        refusal = run_ranks(1, started, back, 1, again / "step_00000000")[0]
        assert "model.head: scalar in the checkpoint, vocabulary in the recipe" in refusal
