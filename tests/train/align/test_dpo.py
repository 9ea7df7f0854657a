"""DPO: the loss of a step is the mean over its pairs at every layout, and equals the formula on answers read one by one."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from expert_models import MIXTURE
from preference_rows import drawn_rows
from ranks import run_ranks
from tiny import ROW_TOKENS, Numbers, engine_of, recipe_with

from data.batch import Batch
from recipes.schema.align import DpoConfig
from recipes.schema.recipe import Recipe
from train.align import dpo
from train.align.losses.preference import PairLogProbs
from train.engine import Engine
from train.model.context import RowContext
from train.parallel.mesh import Mesh
from train.record.stopwatch import Stopwatch
from train.step import StepResult, train_step

ROUNDING = 2e-6  # test_layouts_agree
CONFIG = {
    "objective.kind": "dpo",
    "objective.dpo": DpoConfig(beta=0.3, label_smoothing=0.1, length_normalized=True, sft_weight=0.2),
    "data.reset_at_documents": True,
}
LAYOUTS = {
    "microbatch of 2": (1, {"run.microbatch_rows": 2}),
    "DP2": (2, {}),
    "TP2 SP": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "CP2": (2, {"parallel.context": 2}),
    "TP2 SP CP2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2}),
    "DP2 PP2 virtual": (4, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
}


def rows_of(step: int, positions: np.ndarray) -> Batch:
    """Preferences with a drawn reference: log-probabilities near -5 a token."""
    batch = drawn_rows(step, positions)
    drawn = [np.random.default_rng((step, int(p), 9)).normal(-15, 1, batch.ranks.shape[1]) for p in positions]  # type: ignore[union-attr]
    return replace(batch, reference=torch.from_numpy(np.stack(drawn)))


def microbatches(recipe: Recipe, mesh: Mesh, step: int) -> list[Batch]:
    size, ranks = recipe.run.microbatch_rows, mesh.layout.data
    starts = range(mesh.data_rank * size, recipe.run.global_rows, ranks * size)
    return [rows_of(step, np.arange(start, start + size)) for start in starts]


def step_of(engine: Engine, rows: list[Batch], step: int = 0, lr: float = 1e-3) -> StepResult:
    result = train_step(engine, rows, step=step, learning_rate=lr, watch=Stopwatch())
    return replace(
        result, loss=engine.mesh.sum_over_world(result.loss.clone()), parts=engine.mesh.sum_over_world(result.parts)
    )


def expected_loss(engine: Engine, rows: list[Batch], config: DpoConfig) -> dict[str, float]:
    """Loss and parts in float64 by the formulas, each answer alone in its row with torch's own log-softmax."""
    preference, nats, tokens, better, worse, right = [], 0.0, 0, [], [], []
    for batch in rows:
        for row in range(len(batch.labels)):
            answers = []
            for document, rank in enumerate(batch.ranks[row].tolist()):  # type: ignore[union-attr]
                at = (batch.document_index[row] == document).nonzero().flatten()  # type: ignore[index]
                if rank < 0:
                    continue
                ids = torch.zeros(1, ROW_TOKENS, dtype=torch.int64)
                ids[0, : len(at)] = batch.tokens[row, at]
                context = RowContext(documents=torch.zeros(1, ROW_TOKENS, dtype=torch.int32))
                with torch.no_grad():
                    logits = engine.chunks[0](ids, torch.arange(ROW_TOKENS)[None], None, packed_seq_params=context)
                log_p = logits[0, : len(at)].double().log_softmax(-1)[torch.arange(len(at)), batch.labels[row, at]]
                learned = batch.learned[row, at]  # type: ignore[index]
                count, group = int(learned.sum()), int(batch.groups[row, document])  # type: ignore[index]
                total = float(log_p[learned].sum())
                reward = config.beta * (total - float(batch.reference[row, document])) / count  # type: ignore[index]
                answers.append((group, rank, reward, total, count))
            for group, rank, reward, total, count in answers:
                for other, worse_rank, other_reward, _, _ in answers:
                    if group == other and rank < worse_rank:
                        margin, s = reward - other_reward, config.label_smoothing
                        likely, unlikely = 1 / (1 + math.exp(-margin)), 1 / (1 + math.exp(margin))
                        preference.append(-(1 - s) * math.log(likely) - s * math.log(unlikely))
                        nats, tokens = nats - total, tokens + count
                        better.append(reward)
                        worse.append(other_reward)
                        right.append(margin > 0)
    mean = {"preference": np.mean(preference), "sft": nats / tokens, "chosen_reward": np.mean(better)}
    mean |= {"rejected_reward": np.mean(worse), "margin": np.mean(better) - np.mean(worse), "accuracy": np.mean(right)}
    return {"loss": float(mean["preference"] + config.sft_weight * mean["sft"])} | {
        k: float(v) for k, v in mean.items()
    }


def train(rank: int, recipe: Recipe, world: int) -> tuple[Numbers, dict[str, float], dict[str, float]]:
    """Three steps; loss and parts of the first, and what they should be (of one process only)."""
    expected: dict[str, float] = {}
    with engine_of(recipe, rank=rank, world=world) as engine:
        if world == 1:
            expected = expected_loss(engine, [rows_of(0, np.arange(4))], recipe.objective.dpo)
        results = [step_of(engine, microbatches(recipe, engine.mesh, step), step) for step in range(3)]
    first = {"loss": float(results[0].loss)} | dict(zip(dpo.DPO_PARTS, results[0].parts.tolist(), strict=True))
    return Numbers([float(r.loss) for r in results], [float(r.grad_norm) for r in results]), first, expected


def trained(world: int, **changes: object) -> tuple[Numbers, dict[str, float], dict[str, float]]:
    results = run_ranks(world, train, recipe_with(**CONFIG, **changes), world)
    assert all(result[0] == results[0][0] for result in results)
    return results[0]


@pytest.fixture(scope="module")
def single() -> tuple[Numbers, dict[str, float], dict[str, float]]:
    return trained(1)


def test_loss_and_parts_are_the_formulas_on_answers_read_alone(single: Any) -> None:
    _, first, expected = single
    assert first == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_prefers_as_one_process_does(name: str, single: Any) -> None:
    world, changes = LAYOUTS[name]
    numbers, first, _ = trained(world, **changes)
    assert numbers.losses == pytest.approx(single[0].losses, rel=ROUNDING)
    assert numbers.grad_norms == pytest.approx(single[0].grad_norms, rel=ROUNDING)
    assert first == pytest.approx(single[1], rel=1e-5)


def test_experts_prefer_as_one_process_does() -> None:
    one, two = trained(1, **MIXTURE)[0], trained(2, **MIXTURE, **{"parallel.expert": 2})[0]
    assert two.losses == pytest.approx(one.losses, rel=ROUNDING)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=ROUNDING)


def exchanged(pairs: PairLogProbs) -> PairLogProbs:
    """The pairs with the worse answers as the chosen ones."""
    policy = (pairs.rejected, pairs.chosen, pairs.reference_rejected, pairs.reference_chosen)
    return PairLogProbs(*policy, chosen_tokens=pairs.rejected_tokens, rejected_tokens=pairs.chosen_tokens)


def margins(rank: int, recipe: Recipe, broken: bool) -> tuple[float, float]:
    """Margin over the reference before and after a few steps on the same pairs."""
    if broken:  # in a forked process: the better and the worse answer are exchanged in the loss
        loss: Callable[..., Any] = dpo.dpo_loss
        dpo.dpo_loss = lambda pairs, options, **step: loss(  # type: ignore[assignment]
            exchanged(pairs), options, **step
        )
    with engine_of(recipe, rank=rank, world=1) as engine:
        rows = [drawn_rows(0, np.arange(4))]
        wrapped = [dpo.log_prob_step(engine.mesh)(iter(rows), engine.chunks[0])]
        reference = [report_of(losses)[1].detach() for losses, report_of in wrapped]
        rows = [replace(batch, reference=sums) for batch, sums in zip(rows, reference, strict=True)]
        results = [step_of(engine, rows, step, lr=3e-3) for step in range(6)]
    sign = -1 if broken else 1
    return sign * float(results[0].parts[4]), sign * float(results[-1].parts[4])


def test_it_learns_the_preference_and_the_wrong_sign_learns_the_opposite() -> None:
    recipe = recipe_with(**{"objective.kind": "dpo", "data.reset_at_documents": True, "run.microbatch_rows": 4})
    (before, after), (_, worse) = (run_ranks(1, margins, recipe, broken)[0] for broken in (False, True))
    assert before == pytest.approx(0, abs=1e-6) and after > 0.05 and worse < -0.05
