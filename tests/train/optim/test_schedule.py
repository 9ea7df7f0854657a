"""Learning-rate factors against formulas written from the papers, and against torch's schedulers."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.schema.errors import RecipeError
from recipes.schema.optim import ScheduleConfig
from recipes.schema.schedule import check, learning_rate_factor, lengths_of, unread


def factors(schedule: ScheduleConfig, steps: int, tokens_per_step: int = 1) -> list[float]:
    return [
        learning_rate_factor(
            schedule,
            step=step,
            tokens=step * tokens_per_step,
            total_steps=steps,
            tokens_per_step=tokens_per_step,
        )
        for step in range(steps)
    ]


def test_warmup_rises_from_above_zero_to_exactly_one() -> None:
    assert factors(ScheduleConfig(kind="constant", warmup=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(ScheduleConfig(kind="constant"), 2) == [1.0, 1.0]


def test_wsd_linear_by_hand() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup=2, decay=4, decay_shape="linear", final_fraction=0.2)
    assert factors(schedule, 8) == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-15)


def test_wsd_minus_sqrt_by_hand() -> None:
    # arXiv 2405.18392: 1 - sqrt(t), t = 1/4, 2/4, 3/4, 4/4.
    schedule = ScheduleConfig(kind="wsd", decay=4, decay_shape="minus_sqrt", final_fraction=0.0)
    expected = [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]
    assert factors(schedule, 5) == pytest.approx(expected, abs=1e-15)


def test_wsd_exponential_falls_by_the_same_ratio() -> None:
    schedule = ScheduleConfig(kind="wsd", decay=5, decay_shape="exponential", final_fraction=0.01)
    tail = factors(schedule, 8)[2:]
    assert [b / a for a, b in pairwise(tail)] == pytest.approx([0.01 ** (1 / 5)] * 5)


def test_cosine_equals_torch() -> None:
    steps, warmup, final = 50, 7, 0.1
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    # torch's scheduler stands at t=0 where our warm-up ends, and reaches eta_min after `steps - warmup` more.
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=final)
    expected = []
    for _ in range(steps - warmup + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = factors(ScheduleConfig(kind="cosine", warmup=warmup, final_fraction=final), steps)
    assert ours[warmup - 1 :] == pytest.approx(expected, abs=1e-12)
    assert ours[-1] == final


def test_linear_equals_torch() -> None:
    steps, warmup, final = 50, 7, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    theirs = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=final, total_iters=steps - warmup
    )
    expected = []
    for _ in range(steps - warmup + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = factors(ScheduleConfig(kind="linear", warmup=warmup, final_fraction=final), steps)
    assert ours[warmup - 1 :] == pytest.approx(expected, abs=1e-12)
    assert ours[-1] == final


def test_wsd_cosine_is_half_way_at_half_time() -> None:
    schedule = ScheduleConfig(kind="wsd", decay=10, decay_shape="cosine", final_fraction=0.0)
    assert factors(schedule, 20)[14] == pytest.approx(0.5)


NANO_ROWS = 736 * 8192


@pytest.mark.parametrize(
    ("trained_tokens", "rate"),
    [
        (16.0e12, 4.5e-4),
        (16.3e12, 4.5e-4),
        (18.2e12, 4.5e-6 + (4.5e-4 - 4.5e-6) * (1 - math.sqrt(0.5))),
        (17.3e12, 4.5e-6 + (4.5e-4 - 4.5e-6) * 0.5),
        (20.0e12, 4.5e-6),
        (20.1e12, 4.5e-6),
    ],
)
def test_nemotron_nano_2(trained_tokens: float, rate: float) -> None:
    # arXiv 2508.14444, section 2.5: 20T tokens, 4.5e-4, the last 3.6T fall to 4.5e-6. Shape: minus_sqrt.
    schedule = ScheduleConfig(
        kind="wsd",
        unit="tokens",
        decay=3_600_000_000_000,
        total=20_000_000_000_000,
        final_fraction=0.01,
        decay_shape="minus_sqrt",
    )
    step = math.ceil(trained_tokens / NANO_ROWS)
    factor = learning_rate_factor(
        schedule,
        step=step,
        tokens=step * NANO_ROWS,
        total_steps=3_317_129,
        tokens_per_step=NANO_ROWS,
    )
    assert 4.5e-4 * factor == pytest.approx(rate, rel=1e-4)


shapes = st.sampled_from(["linear", "cosine", "minus_sqrt", "exponential"])
phases = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)).filter(lambda p: sum(p) > 0)


@given(
    kind=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    shape=shapes,
    phase=phases,
    final=st.floats(0.001, 1.0),
)
def test_rises_then_never_rises_again_and_ends_exactly(
    kind: Any, shape: Any, phase: tuple[int, int, int], final: float
) -> None:
    warmup, stable, decay = phase
    decay = decay if kind == "wsd" else 0
    steps = warmup + stable + decay
    if steps == 0:
        return
    schedule = ScheduleConfig(kind=kind, warmup=warmup, decay=decay, decay_shape=shape, final_fraction=final)
    check(schedule, total_steps=steps, tokens_per_step=1)
    values = factors(schedule, steps)
    assert all(0 < value <= 1 for value in values)
    rise, rest = values[:warmup], values[max(warmup - 1, 0) :]
    assert rise == sorted(set(rise)) and (not rise or rise[-1] == 1.0)
    assert all(b <= a + 1e-15 for a, b in pairwise(rest))
    if (kind == "wsd" and decay) or (kind in ("cosine", "linear") and steps > warmup):
        assert values[-1] == final


@given(shape=shapes, phase=phases, tokens_per_step=st.integers(1, 10**7))
def test_tokens_and_steps_say_the_same(shape: Any, phase: tuple[int, int, int], tokens_per_step: int) -> None:
    warmup, _, decay = phase
    steps = sum(phase)
    by_step = ScheduleConfig(warmup=warmup, decay=decay, decay_shape=shape)
    by_token = replace(by_step, unit="tokens", warmup=warmup * tokens_per_step, decay=decay * tokens_per_step)
    assert factors(by_token, steps, tokens_per_step) == pytest.approx(factors(by_step, steps), abs=1e-12)


def test_after_the_end_the_factor_stays() -> None:
    schedule = ScheduleConfig(kind="wsd", decay=5, total=10, final_fraction=0.05, decay_shape="cosine")
    assert factors(schedule, 15)[9:] == [0.05] * 6
    assert factors(replace(schedule, kind="cosine", decay=0), 15)[9:] == [0.05] * 6


def test_without_a_decay_wsd_stays_at_its_peak() -> None:
    assert factors(ScheduleConfig(kind="wsd", warmup=1), 4) == [1.0] * 4


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            ScheduleConfig(warmup=60, decay=50),
            ["schedule.warmup=60", "schedule.decay=50", "run.steps=100", "a sum of 100"],
        ),
        (ScheduleConfig(warmup=6, decay=5, total=10), ["schedule.total=10", "Shorten"]),
        (
            ScheduleConfig(unit="tokens", warmup=900, decay=0),
            ["schedule.warmup=900", "run.steps=100 x 8 tokens", "800"],
        ),
        (ScheduleConfig(warmup=0.8, decay=30), ["schedule.warmup=0.8", "schedule.decay=30", "e.g. schedule.decay=0.2"]),
        (
            ScheduleConfig(decay=5, decay_shape="exponential", final_fraction=0.0),
            ["exponential", "final_fraction=0", "decay_shape=linear"],
        ),
    ],
)
def test_phases_that_do_not_fit(schedule: ScheduleConfig, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        check(schedule, total_steps=100, tokens_per_step=8)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_phases_that_fill_the_run_fit() -> None:
    check(ScheduleConfig(warmup=50, decay=50), total_steps=100, tokens_per_step=8)
    check(ScheduleConfig(kind="cosine", warmup=100), total_steps=100, tokens_per_step=8)


@pytest.mark.parametrize("unit", ["steps", "tokens"])
@given(steps=st.integers(1, 10**7), percents=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_fractions_are_of_the_whole_and_fit_where_they_sum_to_one(
    unit: Any, steps: int, percents: tuple[int, int]
) -> None:
    warmup, decay = percents
    schedule = ScheduleConfig(unit=unit, warmup=warmup / 100, decay=decay / 100)
    found = lengths_of(schedule, total_steps=steps, tokens_per_step=8)
    whole = steps * (1 if unit == "steps" else 8)
    assert (found.warmup, found.decay, found.whole) == (warmup * whole // 100, decay * whole // 100, whole)
    if warmup + decay <= 100:
        check(schedule, total_steps=steps, tokens_per_step=8)


def test_fractions_give_the_same_rates_as_the_steps_they_stand_for() -> None:
    said = ScheduleConfig(warmup=0.1, decay=0.3)
    assert factors(said, 200) == factors(replace(said, warmup=20, decay=60), 200)
    assert factors(said, 20) == factors(replace(said, warmup=2, decay=6), 20)
    assert factors(replace(said, total=100), 200) == factors(replace(said, warmup=10, decay=30, total=100), 200)


def test_a_decay_that_the_kind_does_not_read_is_named() -> None:
    assert unread(ScheduleConfig(kind="cosine", decay=5)) == "schedule.kind=cosine does not read schedule.decay=5"
    assert not unread(ScheduleConfig(kind="cosine")) and not unread(ScheduleConfig(decay=5))
    assert factors(ScheduleConfig(kind="cosine", decay=5), 9) == factors(ScheduleConfig(kind="cosine"), 9)
