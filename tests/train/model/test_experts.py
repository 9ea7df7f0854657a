"""Expert layers: what a router did is counted, groups are multiplied by their own matrix, low precision by expert."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_models import EXPERTS, MIXTURE
from ranks import run_ranks
from tiny import Numbers, engine_of, microbatches, recipe_with, steps_of

from recipes.schema.ledger import Ledger
from recipes.schema.recipe import Recipe
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Request
from train.model.experts import ExpertLayer, LoadReading, expert_loads
from train.model.grouped_linear import grouped_product
from train.native.gemm import multiply_groups
from train.precision.control import Reading
from train.record.stopwatch import Stopwatch
from train.resilience.spikes import SpikeWatch
from train.step import train_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_group_is_multiplied_by_its_own_matrix(dtype: torch.dtype) -> None:
    """Forward and both gradients against one product a row, with an empty group and one of one row."""
    counts = [3, 0, 1, 5]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(4, 16, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    group = torch.arange(4).repeat_interleave(torch.tensor(counts))
    y = grouped_product(x, weight, counts)
    grad = torch.randn(9, 16, generator=generator, dtype=torch.float64).to(dtype)
    got = torch.autograd.grad(y, [x, weight], grad)
    exact_x, exact_w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.einsum("nk,nmk->nm", exact_x, exact_w[group])
    expected = torch.autograd.grad(exact, [exact_x, exact_w], grad.double())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float64: 1e-14}[dtype]
    for ours, theirs in zip((y, *got), (exact, *expected), strict=True):
        assert float((ours.double() - theirs).abs().max() / theirs.abs().max()) < tolerance
    assert got[1][1].eq(0).all()


def test_the_single_call_for_gpus_gives_the_same() -> None:
    """bf16 on a GPU is one call of torch's grouped product; here it runs on the CPU."""
    x, weight = torch.randn(24, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    counts = [8, 0, 16]
    parts = [
        multiply_groups(part, matrix[None], [len(part)]) for part, matrix in zip(x.split(counts), weight, strict=True)
    ]
    assert torch.allclose(multiply_groups(x, weight, counts, in_one_call=True), torch.cat(parts), rtol=1e-2, atol=1e-2)


def loads(rank: int, recipe: Recipe, world: int) -> tuple[list[LoadReading], list[LoadReading], list[float]]:
    """One step; then the readings, those after them, and each layer's bias."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(1))
        readings = expert_loads(engine.chunks, engine.mesh)
        layers = [part for chunk in engine.chunks for part in chunk.modules() if isinstance(part, ExpertLayer)]
        bias = [float(layer.router.expert_bias.abs().max()) for layer in layers]
        return readings, expert_loads(engine.chunks, engine.mesh), bias


def test_loads_are_those_of_all_ranks_and_counted_once() -> None:
    split = {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2, "parallel.recompute": "full"}
    mixture = MIXTURE | {"model.experts": replace(EXPERTS, capacity=None)}
    ((one, none, bias),) = run_ranks(1, loads, recipe_with(**mixture), 1)
    for readings, after, _ in run_ranks(4, loads, recipe_with(**mixture, **split), 4):
        assert [r.layer for r in readings] == [1, 3]
        for got, expected in zip(readings, one, strict=True):
            assert got.load_max == pytest.approx(expected.load_max) and got.dropped == expected.dropped == 0
            assert got.entropy == pytest.approx(expected.entropy, rel=1e-6)
            assert (got.bias_min, got.bias_max) == (expected.bias_min, expected.bias_max)
        assert all(r.load_max == 0 for r in after)
    assert all(r.load_max == 0 for r in none)
    assert max(max(-r.bias_min, r.bias_max) for r in one) == max(bias) > 0
    assert all(1 <= r.load_max <= 2 and 0 <= r.load_min <= 1 and 0 < r.entropy <= 1 for r in one)


def test_dropped_rows_are_counted() -> None:
    """Capacity 0.5 of 4 experts leaves at most half of the rows: the busiest expert has exactly its capacity."""
    mixture = MIXTURE | {"model.experts": replace(EXPERTS, capacity=0.5, bias_rate=0.0)}
    ((readings, _, _),) = run_ranks(1, without_bias, recipe_with(**mixture), 1)
    assert all(r.dropped >= 0.5 - 1e-9 and (r.bias_min, r.bias_max) == (0, 0) for r in readings)


def scored_together_and_alone(rank: int, recipe: Recipe) -> list[bool]:
    """Whether each text has the same log-probabilities with others as by itself."""
    with engine_of(recipe, rank=rank, world=1) as built:
        model = built.chunks[0].module
        requests = [Request([7 + text, *[3] * 20], 0, score_from=1) for text in range(3)]

        def scores(several: list[Request]) -> list[list[float]]:
            found = InferenceEngine(model, recipe.model, EngineConfig(rows=3, context_tokens=24)).run(several)
            return [[token.logprob for event in events for token in event.scores] for events in found]

        alone = [scores([request])[0] for request in requests]
        return [a == pytest.approx(b, abs=1e-5) for a, b in zip(scores(requests), alone, strict=True)]


def test_capacity_drops_nothing_outside_of_training() -> None:
    """Otherwise a text's numbers would depend on the texts that are read with it."""
    mixture = MIXTURE | {"model.experts": replace(EXPERTS, capacity=0.5), "model.init_std": 0.1}
    assert run_ranks(1, scored_together_and_alone, recipe_with(**mixture)) == [[True, True, True]]


def without_bias(rank: int, recipe: Recipe, world: int) -> tuple[list[LoadReading], list[LoadReading], list[float]]:
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(1))
        return expert_loads(engine.chunks, engine.mesh), [], []


def measured(rank: int, recipe: Recipe, world: int) -> tuple[Numbers, list[Reading]]:
    with engine_of(recipe, rank=rank, world=world) as engine:
        result = train_step(
            engine, microbatches(recipe, engine.mesh, 0), step=0, learning_rate=1e-3, watch=Stopwatch(), measure=True
        )
        loss = float(engine.mesh.sum_over_world(result.loss.clone()))
        return Numbers([loss], [float(result.grad_norm)]), engine.precision.health()


@pytest.mark.parametrize("scaling", ["current", "blockwise", "mxfp8", "nvfp4"])
def test_experts_multiply_in_low_precision(scaling: str) -> None:
    """Every linear of an expert layer is quantised and healthy; the loss moves by the format's error, not by more."""
    mixture: dict[str, Any] = MIXTURE | {"model.experts": replace(EXPERTS, ffn=64)}
    ((plain, _),) = run_ranks(1, measured, recipe_with(**mixture), 1)
    ((low, readings),) = run_ranks(1, measured, recipe_with(**mixture, **{"precision.scaling": scaling}), 1)
    names = {(r.layer, r.linear) for r in readings}
    assert {(1, f"mlp.{part}.linear_fc{n}") for part in ("experts", "shared_experts") for n in (1, 2)} <= names
    assert all(r.is_healthy for r in readings), [r for r in readings if not r.is_healthy]
    assert 0 < abs(low.losses[0] / plain.losses[0] - 1) < 5e-3
    assert math.isfinite(low.grad_norms[0]) and low.grad_norms[0] == pytest.approx(plain.grad_norms[0], rel=0.2)


def test_rows_keep_their_scales_on_any_expert_rank() -> None:
    """Blocks of MXFP8 along features do not depend on which rows an expert has, so the first loss does not either."""
    mixture: dict[str, Any] = MIXTURE | {"model.experts": replace(EXPERTS, ffn=64), "precision.scaling": "mxfp8"}
    ((one, _),) = run_ranks(1, measured, recipe_with(**mixture), 1)
    (two, _), _ = run_ranks(2, measured, recipe_with(**mixture, **{"parallel.expert": 2}), 2)
    assert two.losses == pytest.approx(one.losses, rel=1e-6)


def bias_of(engine: Any) -> torch.Tensor:
    layers = [part for chunk in engine.chunks for part in chunk.modules() if isinstance(part, ExpertLayer)]
    return torch.stack([layer.router.expert_bias for layer in layers]).clone()


class Refusing(SpikeWatch):
    """Takes every step for a spike."""

    def reason(self, loss: float, grad_norm: float) -> str | None:
        return "a test"


def biases(rank: int, recipe: Recipe, world: int) -> list[torch.Tensor]:
    """The bias before the update of a step, after it, and after a step that was skipped."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        seen: list[torch.Tensor] = []
        steps_of(engine, recipe, range(1), before_update=lambda: seen.append(bias_of(engine)))
        seen.append(bias_of(engine))
        rows = microbatches(recipe, engine.mesh, 1)
        spikes = Refusing(recipe.run.spikes, Ledger())
        train_step(engine, rows, step=1, learning_rate=1e-3, watch=Stopwatch(), spikes=spikes)
        return [*seen, bias_of(engine)]


def test_the_bias_moves_with_the_weights_only() -> None:
    """A background save copies the state until `before_update`, and a skipped step must not leave a trace."""
    for seen in run_ranks(2, biases, recipe_with(**MIXTURE, **{"parallel.expert": 2}), 2):
        before, after, skipped = seen
        assert before.eq(0).all() and after.abs().max() > 0 and torch.equal(after, skipped)
