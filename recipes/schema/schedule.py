"""Learning rate over time as a pure function of the step (or the tokens). It has no state to save.

Convention: update number `step` counts from 0, and its factor is that of the moment after it, when step + 1 updates (or their
tokens) are done. So no update has factor 0, the last update of a warm-up of W updates has exactly 1, the last of a decay of D
updates exactly `final_fraction`, and warm-up + stable + decay is the whole run.

      1 |    ____________
        |   /            \\           wsd: warm-up, stable, decay over the last `decay`
        |  /              \\__       the factor stays at `final_fraction` after `total`
        +-------------------------> steps or tokens
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from recipes.schema.errors import Problem, refuse
from recipes.schema.optim import ScheduleConfig


def learning_rate_factor(
    schedule: ScheduleConfig, *, step: int, tokens: int, total_steps: int, tokens_per_step: int
) -> float:
    """Factor of `optim.lr` for update number `step` (from 0), with `tokens` trained on before it.

    total_steps: end of the schedule if `schedule.total` is null. The schedule must have no `schedule_problems`.
    """
    lengths = lengths_of(schedule, total_steps=total_steps, tokens_per_step=tokens_per_step)
    done = step + 1 if schedule.unit == "steps" else tokens + tokens_per_step
    if done <= lengths.warmup:
        return done / lengths.warmup
    match schedule.kind:
        case "constant":
            return 1.0
        case "cosine" | "linear":
            return _decayed(schedule.kind, _progress(done, lengths.warmup, lengths.whole), schedule.final_fraction)
        case "wsd":
            if lengths.decay == 0:
                return 1.0
            start = lengths.whole - lengths.decay
            return _decayed(schedule.decay_shape, _progress(done, start, lengths.whole), schedule.final_fraction)


@dataclass(frozen=True)
class Lengths:
    """The phases of a schedule in its own unit, steps or tokens."""

    warmup: int
    decay: int
    """0 without a decay."""
    whole: int


def lengths_of(schedule: ScheduleConfig, *, total_steps: int, tokens_per_step: int) -> Lengths:
    """The phases in whole steps or tokens. A fraction is of the whole schedule, rounded down: a sum of at most 1 fits."""
    whole = schedule.total or (total_steps if schedule.unit == "steps" else total_steps * tokens_per_step)

    def length(value: float) -> int:
        return value if isinstance(value, int) else int(Fraction(repr(value)) * whole)  # exact: 0.29 of 100 is 29

    return Lengths(length(schedule.warmup), length(schedule.decay) if schedule.kind == "wsd" else 0, whole)


def unread(schedule: ScheduleConfig) -> str:
    """Fields that a schedule sets but does not read, as a message; else empty. Swapping the group can leave such fields."""
    idle = schedule.decay and schedule.kind != "wsd"
    return f"schedule.kind={schedule.kind} does not read schedule.decay={schedule.decay}" if idle else ""


def schedule_problems(schedule: ScheduleConfig, *, total_steps: int, tokens_per_step: int) -> list[Problem]:
    """Why the phases of a schedule do not fit into the run."""
    lengths = lengths_of(schedule, total_steps=total_steps, tokens_per_step=tokens_per_step)
    decay, end = schedule.decay if lengths.decay else 0, lengths.whole
    whole = f"schedule.total={schedule.total}"
    if schedule.total is None:
        whole = f"run.steps={total_steps}" + ("" if schedule.unit == "steps" else f" x {tokens_per_step} tokens a step")
    problems = []
    if lengths.warmup + lengths.decay > end:
        text = (
            f"schedule.warmup={schedule.warmup} + schedule.decay={decay} {schedule.unit} are longer than the whole "
            f"schedule, {whole}."
        )
        remedy = (
            f"Shorten them to a sum of {end}, e.g. {_that_fits(lengths)} (below 1: a fraction of the whole), or raise run.steps "
            f"or schedule.total."
        )
        problems.append(Problem("schedule.warmup", text, remedy))
    if schedule.kind == "wsd" and decay and schedule.decay_shape == "exponential" and schedule.final_fraction == 0:
        text = "schedule.decay_shape=exponential cannot reach schedule.final_fraction=0."
        remedy = "Use a fraction above 0, or schedule.decay_shape=linear."
        problems.append(Problem("schedule.decay_shape", text, remedy))
    return problems


def check(schedule: ScheduleConfig, *, total_steps: int, tokens_per_step: int) -> None:
    """Raise RecipeError with every `schedule_problems`."""
    refuse(schedule_problems(schedule, total_steps=total_steps, tokens_per_step=tokens_per_step))


def _that_fits(lengths: Lengths) -> str:
    """The phase to shorten, and a fraction that fits."""
    for name, rest, most in (
        ("decay", lengths.whole - lengths.warmup, 20),
        ("warmup", lengths.whole - lengths.decay, 10),
    ):
        percent = min(most, 100 * rest // lengths.whole)
        if percent > 0 and (name == "warmup" or lengths.decay):
            return f"schedule.{name}={percent / 100:g}"
    return "schedule.warmup=0.1 schedule.decay=0.2" if lengths.decay else "schedule.warmup=0.1"


def _progress(done: int, start: int, end: int) -> float:
    """Where `done` is between `start` (0) and `end` (1), limited to this range and exact at both ends."""
    if done >= end:
        return 1.0
    return max(0.0, (done - start) / (end - start))


def _decayed(shape: Literal["linear", "cosine", "minus_sqrt", "exponential"], progress: float, final: float) -> float:
    """From 1 at progress 0 to exactly `final` at progress 1. `minus_sqrt`: arXiv 2405.18392, section 3.2."""
    match shape:
        case "exponential":
            return final**progress
        case "linear":
            left = 1 - progress
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
        case "minus_sqrt":
            left = 1 - math.sqrt(progress)
    return final + (1 - final) * left
