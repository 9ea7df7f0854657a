"""Multi-token prediction: the loss and gradients of plain float64 torch, the same at every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from depth_equations import Weights, logits_of_depths
from expert_models import EXPERTS
from ranks import run_ranks
from tiny import Numbers, engine_of, masked_rows, microbatches, recipe_with, rows_of, steps_of, train_tiny

from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from train.build import build_engine, check, mesh_of
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.engine import run_schedule
from train.model.initial import global_names
from train.objective.several_tokens import ahead_of
from train.objective.step_counts import count_step

TWO: dict[str, Any] = {"model.pattern": "*-", "model.mtp.depths": 2, "model.mtp.pattern": "*-"}
APART = {"data.reset_at_documents": True}
ROUNDING = 2e-6


def _reference(w: Weights, recipe: Recipe, step: int) -> tuple[torch.Tensor, list[float]]:
    """(the loss of a step, [next-token loss, losses of the depths, shares of right guesses]), from the paper's equations."""
    sums, counts, right = [torch.zeros(()) for _ in range(3)], [0, 0, 0], [0, 0]
    batch = rows_of(step, torch.arange(recipe.run.global_rows).numpy())
    assert batch.document_index is not None
    for tokens, labels, documents in zip(batch.tokens, batch.labels, batch.document_index, strict=True):
        for k, all_logits in enumerate(logits_of_depths(w, recipe.model.mtp, tokens, documents)):
            exists = [t for t in range(len(tokens) - k) if documents[t + k] == documents[t]]
            logits, targets = all_logits[exists], labels[[t + k for t in exists]]
            sums[k] = sums[k] + F.cross_entropy(logits, targets, reduction="sum")
            counts[k] += len(exists)
            if k:
                right[k - 1] += int((logits.argmax(-1) == targets).sum())
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    shares = [number / count for number, count in zip(right, counts[1:], strict=True)]
    return means[0] + recipe.model.mtp.loss_scale / 2 * (means[1] + means[2]), [*map(float, means), *shares]


def _gaps(rank: int, recipe: Recipe) -> tuple[float, dict[str, float]]:
    """For `run_ranks`: the largest relative gaps to the reference, of the reported numbers and of each gradient."""
    with engine_of(recipe, rank=rank, world=1) as engine:
        names = list(global_names(engine.chunks[0].module))
        w = {name: p.detach().double().requires_grad_() for name, p in names}
        loss, numbers = _reference(w, recipe, 0)
        loss.backward()
        rows, _ = count_step(engine.mesh, microbatches(recipe, engine.mesh, 0), engine.counter)
        reports = run_schedule(engine, rows, forward_step=engine.forward_step)
        found = torch.stack(reports).mean(0).tolist()
        gaps = {}
        for name, p in names:
            theirs = w[name].grad
            assert theirs is not None
            gaps[name] = float((p.main_grad - theirs).abs().max() / theirs.abs().max())
        return max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(found, numbers, strict=True)), gaps


@pytest.mark.parametrize("repeated", [False, True])
def test_losses_and_gradients_are_those_of_the_papers_equations(repeated: bool) -> None:
    own = {"model.mtp.repeated": repeated, "model.mtp.loss_scale": 0.7, "model.init_std": 0.1}
    recipe = recipe_with(**TWO, **APART, **own)
    ((numbers, gaps),) = run_ranks(1, _gaps, recipe)
    assert len([name for name in gaps if name.startswith("mtp.")]) == 10 * recipe.model.mtp.sets
    assert numbers < 1e-6
    assert max(gaps.values()) < 1e-5, gaps


def _trained(world: int, **changes: Any) -> Numbers:
    results = run_ranks(world, train_tiny, recipe_with(**{**TWO, **changes}), world)
    assert all(result == results[0] for result in results)
    return results[0]


def _agree(found: Numbers, reference: Numbers) -> None:
    assert found.losses == pytest.approx(reference.losses, rel=ROUNDING)
    assert found.grad_norms == pytest.approx(reference.grad_norms, rel=ROUNDING)


def test_layouts_train_further_depths_as_one_process() -> None:
    tied = {"model.tie_embeddings": True, "model.pattern": "M-*-", "model.mtp.pattern": "Mw", "model.window_tokens": 9}
    pieces = {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}
    _agree(_trained(4, **tied, **APART, **pieces), _trained(1, **tied, **APART))
    _agree(_trained(2, **{"parallel.context": 2}), _trained(1))


def test_experts_in_further_depths_train_as_one_process() -> None:
    mixed = {"model.pattern": "M*", "model.mtp.pattern": "*E", "model.experts": EXPERTS, "model.mtp.repeated": True}
    _agree(_trained(2, **mixed, **{"parallel.expert": 2}), _trained(1, **mixed))


def _masked(rank: int, recipe: Recipe, world: int) -> Numbers:
    with engine_of(recipe, rank=rank, world=world) as engine:
        return steps_of(engine, recipe, range(2), rows=masked_rows)


def test_learned_labels_count_by_their_number_at_every_layout() -> None:
    recipe = recipe_with(**TWO, **APART)
    _agree(run_ranks(2, _masked, recipe, 2)[0], run_ranks(1, _masked, recipe, 1)[0])


def test_each_field_changes_training() -> None:
    plain = _trained(1)
    changes: list[dict[str, Any]] = [
        {"model.mtp.depths": 0}, {"model.mtp.depths": 1}, {"model.mtp.pattern": "M"}, {"model.mtp.repeated": True},
        {"model.mtp.loss_scale": 0.2},
    ]  # fmt: skip
    for change in changes:
        assert abs(_trained(1, **change).grad_norms[0] / plain.grad_norms[0] - 1) > 1e-5, change


def _started(rank: int, folder: Path, with_depths: Recipe, without: Recipe) -> list[float]:
    """For `run_ranks`: the largest gap of the weights that both models have, starting from the other one's checkpoint, and of the
    depths that were drawn."""
    gaps = []
    for saved, started in ((with_depths, without), (without, with_depths)):
        place = folder / str(saved.model.mtp.depths)
        with engine_of(saved, rank=rank, world=1) as engine:
            steps_of(engine, saved, range(1))
            state = RunState(step=1, position=4, recipe=recipe_mapping(saved), data_hash="h")
            path = CheckpointFolder(place, saved.checkpoint).save(engine, state)
            before = {name: p.detach().clone() for name, p in global_names(engine.chunks[0].module)}
        torch.manual_seed(1)
        with mesh_of(started, check(started, world=1), device=torch.device("cpu"), rank=rank) as mesh:
            after = dict(global_names(build_engine(started, mesh, weights=path).chunks[0].module))
            gaps.append(max(float((after[n] - before[n]).abs().max()) for n in before.keys() & after.keys()))
        for name in after.keys() - before.keys():
            assert name.startswith("mtp.") and float(after[name].std() if "norm" not in name else 0) < 0.03
    return gaps


def test_a_run_starts_from_weights_with_other_depths(tmp_path: Path) -> None:
    with_depths = recipe_with(**TWO)
    without = recipe_with(**{**TWO, "model.mtp.depths": 0})
    (gaps,) = run_ranks(1, _started, tmp_path, with_depths, without)
    assert gaps == [0.0, 0.0]


def test_labels_end_with_the_row_and_the_document() -> None:
    batch = rows_of(0, torch.arange(2).numpy())
    ahead = ahead_of(batch, 2, reset_at_documents=True)
    assert batch.document_index is not None
    length = batch.tokens.shape[1]
    for k in (1, 2):
        for row in range(2):
            for t in range(length):
                learned = t + k < length and batch.document_index[row, t + k] == batch.document_index[row, t]
                assert bool(ahead.learned_DBS[k - 1, row, t]) == bool(learned)
                if t + k < length:
                    assert ahead.tokens_DBS[k - 1, row, t] == batch.tokens[row, t + k]
                    assert ahead.labels_DBS[k - 1, row, t] == batch.labels[row, t + k]
