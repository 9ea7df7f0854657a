"""Spikes: OLMo-core's rule against its formula, budgets, and steps that are skipped on every rank."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import engine_of, microbatches, recipe_with

from recipes.schema.errors import NumericsError
from recipes.schema.ledger import Ledger, ledger_of
from recipes.schema.rules import problems
from recipes.schema.spikes import SpikesConfig
from train.record.stopwatch import Stopwatch
from train.resilience.spikes import Spike, SpikeWatch, ledger_after_rollback
from train.step import train_step


def olmo_core_refuses(values: list[float], value: float, *, sigma: float, window: int) -> bool:
    """OLMo-core's rule, by its formula, in torch: false until half of the window is known."""
    known = torch.tensor(values[-window:], dtype=torch.float64)
    if len(known) < window // 2:
        return False
    deviation, mean = torch.std_mean(known)
    return bool(value - mean > sigma * deviation)


@pytest.mark.parametrize("planted", ["loss", "grad_norm"])
def test_the_rule_is_olmo_cores(planted: str) -> None:
    generator = np.random.default_rng(0)
    watch = SpikeWatch(SpikesConfig(policy="skip", window_steps=16, sigma=3.0, most_in_a_row=1000), Ledger())
    seen: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    found = 0
    for step in range(1, 400):
        values = {"loss": 3 + 0.1 * generator.standard_normal(), "grad_norm": 1 + 0.2 * generator.standard_normal()}
        if step % 37 == 0:
            values[planted] *= 1 + step % 5
        expected = any(olmo_core_refuses(seen[name], value, sigma=3.0, window=16) for name, value in values.items())
        reason = watch.reason(**values)
        assert (reason is not None) == expected, step
        watch.note(step, **values, refused=reason)
        found += expected
        for name, value in values.items():
            seen[name].append(value)
    assert found >= 6 and len(watch.ledger.skipped_steps) == found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_at_once_and_stay_out_of_the_window(value: float) -> None:
    watch = SpikeWatch(SpikesConfig(policy="skip", most_in_a_row=2), Ledger())
    for step in (1, 2):
        reason = watch.reason(value, 1.0)
        assert reason is not None and "its loss is" in reason
        watch.note(step, loss=value, grad_norm=1.0, refused=reason)
    assert watch.ledger.losses == () and watch.ledger.skipped_steps == (1, 2)
    with pytest.raises(NumericsError, match=r"step 3: its loss is nan. .*most_in_a_row=2"):
        watch.note(3, loss=value, grad_norm=1.0, refused="its loss is nan")


def test_the_ledger_survives_json_and_bad_ones_are_refused() -> None:
    ledger = Ledger(((3, 5), (9, 12)), (4, 7), 1, 2, (2.5, 1 / 3), (0.1,))
    plain = {name: getattr(ledger, name) for name in Ledger.__dataclass_fields__}
    assert ledger_of(plain) == ledger
    for bad in (
        [], {"left_out": [[5, 3]]}, {"left_out": [[1, 4], [3, 6]]}, {"rollbacks": -1}, {"losses": [float("nan")]},
        {"skipped_steps": [True]}, {"more": 1}, {"left_out": [[1, 2, 3]]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"ledger|unpack|expected"):
            ledger_of(bad)


def test_a_rollback_leaves_out_the_steps_before_the_spike_but_none_that_the_checkpoint_has() -> None:
    spike = Spike(10, "its loss is nan", float("nan"), 1.0)
    saved = Ledger(losses=(2.0,))
    config = SpikesConfig(policy="rollback", leave_out_steps=1, most_rollbacks=2)
    after = ledger_after_rollback(spike, config, now=Ledger(), saved=saved, saved_step=6, global_rows=4)
    assert after == replace(saved, left_out=((36, 40),), rollbacks=1)
    longer = replace(config, leave_out_steps=100)
    assert ledger_after_rollback(spike, longer, now=Ledger(), saved=saved, saved_step=6, global_rows=4).left_out == (
        (24, 40),
    )
    with pytest.raises(NumericsError, match=r"has gone back 2 times \(run.spikes.most_rollbacks=2\)"):
        ledger_after_rollback(spike, config, now=replace(after, rollbacks=2), saved=saved, saved_step=6, global_rows=4)


def test_recipes_that_cannot_go_back_are_refused() -> None:
    def keys(**changes: Any) -> list[str]:
        return [p.key for p in problems(recipe_with(**{"run.spikes.policy": "rollback"} | changes))]

    assert "checkpoint.every_steps" in keys(**{"checkpoint.every_steps": 0})
    assert "run.spikes.policy" not in keys(**{"checkpoint.every_steps": 2})
    assert "run.spikes.policy" in keys(**{"objective.kind": "dpo"})
    assert "run.spikes.policy" in keys(**{"objective.kind": "grpo"})


def poisoned_steps(rank: int, changes: dict[str, Any], world: int) -> tuple[list[bool], dict[str, torch.Tensor], int]:
    """Steps 0 to 3, of which step 2 has a loss that is not finite on rank 0 only. -> which were skipped; weights, moments, and
    Adam's count."""
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=world) as engine:
        spikes = SpikeWatch(SpikesConfig(policy="skip"), Ledger())
        skipped = []
        for step in range(4):
            hook = engine.chunks[0].module.register_forward_hook(
                lambda _module, _input, losses, at=step: losses * float("nan") if at == 2 and rank == 0 else None
            )
            result = train_step(
                engine, microbatches(recipe, engine.mesh, step), step=step, learning_rate=1e-3, watch=Stopwatch(),
                spikes=spikes,
            )  # fmt: skip
            hook.remove()
            skipped.append(result.spike is not None)
        for chunk in engine.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        weights = {name: p.detach().clone() for chunk in engine.chunks for name, p in chunk.module.named_parameters()}
        return skipped, weights, int(engine.optimizer.param_groups[0]["step"])


def clean_steps(rank: int, changes: dict[str, Any], world: int) -> tuple[dict[str, torch.Tensor], int]:
    """The same without step 2."""
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=world) as engine:
        for step in (0, 1, 3):
            train_step(
                engine, microbatches(recipe, engine.mesh, step), step=step, learning_rate=1e-3, watch=Stopwatch()
            )
        for chunk in engine.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        weights = {name: p.detach().clone() for chunk in engine.chunks for name, p in chunk.module.named_parameters()}
        return weights, int(engine.optimizer.param_groups[0]["step"])


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {}),
        (2, {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}),
    ],
)
def test_a_skipped_step_changes_nothing_on_any_rank(world: int, changes: dict[str, Any]) -> None:
    poisoned = run_ranks(world, poisoned_steps, changes, world)
    clean = run_ranks(world, clean_steps, changes, world)
    for (skipped, weights, count), (expected, expected_count) in zip(poisoned, clean, strict=True):
        assert skipped == [False, False, True, False]
        assert count == expected_count == 3
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
