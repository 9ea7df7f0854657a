"""The bytes that ranks send in a step, recorded from torch's process groups, equal the plan's to the byte; calls are counted.

What is sent twice, or was forgotten in the plan, shows here. bf16 weights, fp32 gradients, as on GPUs; averaged over ranks, as in
the plan. Calls of up to 16 elements (the gradient's norm, the loss, flags) are counted apart.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from collective_bytes import SMALL, Recorder, Sent, axes_of
from ranks import run_ranks
from tiny import GEMMA, TINY, engine_of, recipe_with, steps_of

from launch.plan.cost.device import device_named
from launch.plan.planner import make_plan
from recipes.schema.recipe import Recipe

SP = {"parallel.tensor": 2, "parallel.sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "DP2 overlapped": (2, {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}),
    "TP2": (2, {"parallel.tensor": 2}),
    "TP2 SP": (2, SP),
    "TP2 SP recompute": (2, {**SP, "parallel.recompute": "full"}),
    "TP2 SP Gemma 2": (2, {**SP, **GEMMA}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "PP2 uneven": (2, {"parallel.pipeline": 2, "model.pattern": "M-M*-M-|M*-"}),
    "PP2 VP2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "CP2 without attention": (2, {"parallel.context": 2, "model.pattern": "M-MM-"}),
    "TP2 SP PP2": (4, {**SP, "parallel.pipeline": 2}),
    "TP2 SP CP2 without attention": (4, {**SP, "parallel.context": 2, "model.pattern": "M-MM-"}),
    "TP2 SP DP2": (4, SP),
}


def sent_in_a_step(rank: int, recipe: Recipe, world: int) -> Sent:
    """For `run_ranks`: what this rank sends in its second step."""
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(1))
        with Recorder(axes_of(engine.mesh)) as recorder:
            steps_of(engine, recipe, range(1, 2))
        return recorder.sent


def recorded(world: int, recipe: Recipe) -> tuple[dict[str, float], Counter[tuple[str, str]], int]:
    """-> (bytes by axis, averaged over ranks; calls of rank 0 by axis and operation; its small calls)."""
    ranks = run_ranks(world, sent_in_a_step, recipe, world)
    by_axis: Counter[str] = Counter()
    for one in ranks:
        for (axis, _, _), size in one.bytes.items():
            by_axis[axis] += size
    calls: Counter[tuple[str, str]] = Counter()
    for (axis, operation, _), count in ranks[0].calls.items():
        calls[axis, operation] += count
    return {axis: size / world for axis, size in by_axis.items()}, calls, ranks[0].small_calls


def planned(world: int, recipe: Recipe) -> dict[str, float]:
    plan = make_plan(recipe, world=world, device=device_named("h100"))
    return {axis: size for axis, size in plan.traffic.wire_bytes.items() if size}


def bf16(**changes: Any) -> Recipe:
    return recipe_with(**{"precision.params": "bf16", **changes})


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_of_a_step_are_the_plans(name: str) -> None:
    world, changes = LAYOUTS[name]
    recipe = bf16(**changes)
    found, calls, small = recorded(world, recipe)
    print(name, found, dict(calls), small)
    assert found == planned(world, recipe)
    assert small <= 40, f"{small} calls of at most {SMALL} elements in one step"


def test_calls_of_a_step() -> None:
    """Sequence parallel: each layer gathers its input, scatters its output, and backward the same and its input again. The
    embedding scatters, its gradient is gathered; the head gathers twice, scatters once. Data: a bucket for each format."""
    layers, microbatches = len(TINY.pattern), 4
    _, calls, _ = recorded(2, bf16(**SP))
    assert calls["tensor", "_allgather_base_"] == microbatches * (3 * layers + 3)
    assert calls["tensor", "_reduce_scatter_base_"] == microbatches * (2 * layers + 2)
    assert calls["tensor", "allreduce_"] == 3 * microbatches + 1
    _, calls, _ = recorded(2, bf16())
    assert calls == {("data", "reduce_scatter_tensor_coalesced_"): 2, ("data", "allgather_into_tensor_coalesced_"): 2}


def test_attention_over_context_ranks_gathers_two_thirds_of_a_ring() -> None:
    """On a CPU, keys and values are gathered once and their gradients scattered. Transformer Engine's ring, which the plan
    counts, passes them on in backward once more."""
    recipe = bf16(**{"parallel.context": 2})
    without = replace(recipe, model=replace(recipe.model, pattern=TINY.pattern.replace("*", "")))
    ring = planned(2, recipe)["context"] - planned(2, without)["context"]
    found, _, _ = recorded(2, recipe)
    assert found["context"] == planned(2, recipe)["context"] - ring / 3
    assert found["data"] == planned(2, recipe)["data"]
