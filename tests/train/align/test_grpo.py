"""GRPO with the model's own engine: rollouts, losses and gradients do not depend on the layout; rewards are learned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy_runs import Learned, learn, policy_recipe, policy_stream, prompts_in, write_start
from ranks import RankFailed, run_ranks
from tiny import GEMMA, engine_of, recipe_with, rows_of

from recipes.schema.errors import DataError
from recipes.schema.objective import ObjectiveConfig
from recipes.schema.recipe import Recipe
from train.align import policy_stream as stream_module
from train.align.losses.policy import group_advantages
from train.align.policy_step import token_losses
from train.model.context import RowContext
from train.record.stopwatch import Stopwatch
from train.step import train_step

ROUNDING = 2e-6  # test_layouts_agree
LAYOUTS: dict[str, dict[str, Any]] = {"TP2": {"parallel.tensor": 2}, "DP2": {}}
OPTIONS = {
    "objective.grpo.updates_per_batch": 2, "objective.grpo.dynamic_sampling": True, "objective.grpo.temperature": 0.8,
    "objective.grpo.advantage": "leave_one_out", "objective.grpo.mask_overlong": True, "objective.grpo.kl_weight": 0.05,
    "objective.grpo.off_policy_steps": 1, "objective.grpo.importance_cap": 2.0, "objective.grpo.max_answer_tokens": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and a start whose weights differ from those of the policy, so that there is a divergence."""
    folder = tmp_path_factory.mktemp("grpo")
    prompts_in(folder)
    recipe = policy_recipe(folder, **{"run.seed": 5})
    run_ranks(1, write_start, recipe)
    return folder


def learned(folder: Path, name: str, world: int, **changes: Any) -> Learned:
    """Four steps with rewards in a journal of their own."""
    recipe = policy_recipe(folder, **OPTIONS, **changes)
    (folder / name).mkdir(exist_ok=True)
    recipe = replace(recipe, run=replace(recipe.run, folder=str(folder / name), start_from=str(folder / "start")))
    results = run_ranks(world, learn, recipe, world, 4)
    assert all(result.answers == results[0].answers for result in results)
    return results[0]


@pytest.fixture(scope="module")
def single(folder: Path) -> Learned:
    return learned(folder, "single", 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_draws_and_learns_as_one_process(folder: Path, name: str, single: Learned) -> None:
    found = learned(folder, name, 2, **LAYOUTS[name])
    assert found.answers == single.answers and found.rewards == single.rewards
    assert found.numbers.losses == pytest.approx(single.numbers.losses, rel=ROUNDING, abs=1e-7)
    assert found.numbers.grad_norms == pytest.approx(single.numbers.grad_norms, rel=ROUNDING)
    assert np.allclose(found.parts, single.parts, rtol=1e-5, atol=1e-7)


def test_sampler_and_trainer_have_the_same_log_probabilities(single: Learned) -> None:
    gaps = [event["log_prob_gap"] for event in single.events if event["kind"] == "rollouts"]
    assert len(gaps) == 3  # two batches, and one ahead
    assert all(gap["max"] <= 1e-5 and gap["mean"] <= 1e-6 for gap in gaps)
    assert single.parts[0][0] > 1e-3, "the divergence from other weights"


def learn_of_other_answers(rank: int, recipe: Recipe, world: int) -> None:
    """The sampler's log-probabilities are off by more than rounding."""
    draw = stream_module.draw_answers
    stream_module.draw_answers = lambda *words, **options: [
        [replace(answer, log_probs=answer.log_probs - 2e-5) for answer in group] for group in draw(*words, **options)
    ]
    with engine_of(recipe, rank=rank, world=world) as engine, policy_stream(engine, recipe) as (stream, events):
        before = [weight.clone() for weight in engine.chunks[0].parameters()]
        try:
            train_step(engine, next(stream), step=0, learning_rate=1e-3, watch=Stopwatch())
        finally:
            assert all(map(torch.equal, engine.chunks[0].parameters(), before)) and not events.found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("updates", [1, 2], ids=["compared in the update", "compared before it"])
def test_a_larger_gap_stops_all_ranks_and_names_answer_and_token(folder: Path, updates: int, world: int) -> None:
    recipe = policy_recipe(folder, **{"objective.grpo.updates_per_batch": updates})
    with pytest.raises(
        RankFailed, match=r"NumericsError: step 1: .* answer \d to the prompt at position \d+: log p of token \d+"
    ):
        run_ranks(world, learn_of_other_answers, recipe, world)


def digits(rank: int, recipe: Recipe, steps: int, is_broken: bool) -> list[float]:
    """Mean rewards of the batches."""
    if is_broken:
        stream_module.group_advantages = lambda *a, **k: torch.zeros_like(group_advantages(*a, **k))
    return [event["reward_mean"] for event in learn(rank, recipe, 1, steps).events if event["kind"] == "rollouts"]


@pytest.mark.parametrize(("is_broken", "steps"), [(False, 28), (True, 12)])
def test_a_reward_is_learned_and_not_without_advantages(tmp_path: Path, is_broken: bool, steps: int) -> None:
    """Digits in four random tokens: 2 % of the characters at first."""
    prompts_in(tmp_path)
    recipe = policy_recipe(
        tmp_path,
        **{
            "objective.grpo.kl_weight": 0.0, "objective.grpo.prompts_per_step": 2, "objective.grpo.generations_per_prompt": 16,
            "objective.grpo.updates_per_batch": 2, "objective.grpo.passes_per_batch": 2, "objective.grpo.clip_high": 1.0,
            "objective.grpo.max_answer_tokens": 4, "optim.lr": 2e-2, "run.microbatch_rows": 4, "data.row_tokens": 256,
        },
    )  # fmt: skip
    rewards = run_ranks(1, digits, recipe, steps, is_broken)[0]
    assert np.mean(rewards[:2]) < 0.1
    assert (max(rewards) < 0.1) if is_broken else (np.mean(rewards[-2:]) > 0.9)


@pytest.mark.parametrize("world", [1, 2])
def test_failing_verifiers_cost_their_answers_the_reward_and_are_counted(tmp_path: Path, world: int) -> None:
    ways = ["raise", "hang", "nan", "none"]
    path = prompts_in(tmp_path, count=len(ways), function="tests.reward_functions:fails")
    records = [json.loads(line) | {"how": how} for line, how in zip(path.read_text().splitlines(), ways, strict=True)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {
        "objective.grpo.prompts_per_step": 4, "objective.grpo.generations_per_prompt": 2, "objective.grpo.kl_weight": 0.0,
        "objective.grpo.verifier_seconds": 0.2,
    }  # fmt: skip
    found = run_ranks(world, learn, policy_recipe(tmp_path, **options), world, 1)[0]
    (event,) = [event for event in found.events if event["kind"] == "rollouts"]
    assert event["verifiers"]["function"]["failures"] == {"raised": 2, "timed out": 2, "not a number": 2}
    warnings = [event["text"] for event in found.events if event["kind"] == "warning"]
    assert len(warnings) == 3 and all("2 of 8 answers have no reward" in text for text in warnings)
    assert any(f"{path} line 1: verifier function raised ValueError: no reward" in text for text in warnings)
    assert event["verifiers"]["function"]["answers"] == 8 and event["reward_mean"] is not None
    assert np.isfinite(found.numbers.losses).all() and np.isfinite(found.numbers.grad_norms).all()


def unreadable(rank: int, recipe: Recipe) -> str:
    """What a rank reports if rank 1 alone cannot read the journal."""
    read = Path.read_bytes
    if rank == 1:
        Path.read_bytes = refuse_rewards  # type: ignore[method-assign]
    try:
        with engine_of(recipe, rank=rank, world=2) as engine, policy_stream(engine, recipe):
            return ""
    except DataError as error:
        return str(error)
    finally:
        Path.read_bytes = read  # type: ignore[method-assign]


def refuse_rewards(path: Path) -> bytes:
    if path.parent.name == "rewards":
        raise PermissionError(13, "Permission denied")
    with path.open("rb") as stream:
        return stream.read()


def test_a_journal_that_one_rank_cannot_read_is_reported_by_all_ranks(tmp_path: Path) -> None:
    """That rank alone raised, and the others waited for it."""
    prompts_in(tmp_path)
    recipe = policy_recipe(tmp_path, **{"objective.grpo.kl_weight": 0.0})
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "step_00000000.00000.jsonl").write_text("")
    first, second = run_ranks(2, unreadable, recipe)
    assert first == second and "step_00000000.00000.jsonl cannot be read: Permission denied" in first


def rewarded(rank: int, recipe: Recipe) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """(rewards of a batch, what the reward model gives the same texts, events)."""
    with engine_of(recipe, rank=rank, world=1) as engine, policy_stream(engine, recipe) as (stream, events):
        microbatches = next(stream)
        assert stream._batch is not None and stream._frozen.rewards is not None
        texts = [[*request.context, *request.target] for request in stream._parts[0].requests]
        with torch.no_grad():
            scores = stream._frozen.rewards.scores(texts)
        again = stream._scored([0], [[stream._batch.answers[0]] * 9])[0]
        assert len({reward.value for reward in again}) == 1, "equal answers would seem to tell something"
        train_step(engine, microbatches, step=0, learning_rate=0.0, watch=Stopwatch())  # records the batch
        return stream._batch.rewards.reshape(-1).tolist(), scores, events.found


def test_rewards_of_a_reward_model_are_learned_from_and_verifiers_recorded(tmp_path: Path) -> None:
    prompts_in(tmp_path)
    model = policy_recipe(
        tmp_path, **{"run.seed": 7, "model.head": "scalar", "objective": ObjectiveConfig(kind="reward")}
    )
    run_ranks(1, write_start, model)
    options = {"objective.grpo.reward_model": str(tmp_path / "start"), "objective.grpo.kl_weight": 0.0}
    rewards, scores, events = run_ranks(1, rewarded, policy_recipe(tmp_path, **options))[0]
    assert rewards == pytest.approx(scores, abs=1e-6) and len(set(rewards)) == len(rewards)
    (event,) = [event for event in events if event["kind"] == "rollouts"]
    assert event["reward_mean"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert event["verifiers"]["function"]["answers"] == 12
    assert event["verifiers"]["function"]["reward_mean"] != event["reward_mean"]


def tempered(rank: int, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of labels at temperature 0.7: of the objective, and from the model's own logits in float64."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        model, rows = engine.chunks[0].module, rows_of(0, np.arange(2))
        with torch.no_grad():
            ours = token_losses(model, rows, mesh=engine.mesh, temperature=0.7)
            context = RowContext(documents=rows.document_index)
            positions = torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)
            logits = model(rows.tokens, positions, None, packed_seq_params=context).double() / 0.7
        assert model.temperature == 1
        return ours, -torch.log_softmax(logits, -1).gather(-1, rows.labels[..., None])[..., 0]


def test_the_loss_is_that_of_the_temperature_also_with_a_soft_cap() -> None:
    ours, expected = run_ranks(1, tempered, recipe_with(**GEMMA, **{"data.reset_at_documents": True}))[0]
    torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=2e-6)
