"""Learning rate over time as a pure function of the step (or the tokens): nothing to save, nothing to restore.

Convention: update number `step` counts from 0. Warm-up rises linearly and reaches 1 with update number `warmup`, never
starting at 0; a decay reaches exactly `final_fraction` with the last update of `total`.
"""

import math

from train.config import ScheduleConfig
from train.errors import RecipeError


def learning_rate_factor(
    schedule: ScheduleConfig, *, step: int, tokens: int, total_steps: int, tokens_per_step: int
) -> float:
    """Factor of `optim.lr` for update number `step`, which trains on the tokens after `tokens`."""
    if schedule.unit == "steps":
        now, unit, end = step, 1, schedule.total or total_steps
    else:
        now, unit, end = tokens, tokens_per_step, schedule.total or total_steps * tokens_per_step
    if now < schedule.warmup:
        return (now + unit) / (schedule.warmup + unit)
    last = end - unit  # where the last update stands
    match schedule.kind:
        case "constant":
            return 1.0
        case "cosine":
            t = _progress(now, schedule.warmup, last)
            return _between(0.5 * (1 + math.cos(math.pi * t)), schedule.final_fraction)
        case "wsd":
            t = _progress(now, end - schedule.decay - unit, last) if schedule.decay else 0.0
            match schedule.decay_shape:
                case "linear":
                    return _between(1 - t, schedule.final_fraction)
                case "cosine":
                    return _between(0.5 * (1 + math.cos(math.pi * t)), schedule.final_fraction)
                case "minus_sqrt":
                    return _between(1 - math.sqrt(t), schedule.final_fraction)
                case "exponential":
                    return schedule.final_fraction**t


def check(schedule: ScheduleConfig, *, total_steps: int, tokens_per_step: int) -> None:
    """Raise RecipeError where the phases of a schedule do not fit into the run."""
    end = schedule.total or (total_steps if schedule.unit == "steps" else total_steps * tokens_per_step)
    decay = schedule.decay if schedule.kind == "wsd" else 0
    if schedule.warmup + decay > end:
        raise RecipeError(
            f"schedule.warmup={schedule.warmup} + schedule.decay={decay} is longer than the {end} {schedule.unit} of the "
            f"schedule. Shorten them, or lengthen run.steps or schedule.total."
        )
    if schedule.kind == "wsd" and schedule.decay and schedule.decay_shape == "exponential" and not schedule.final_fraction:
        raise RecipeError(
            "schedule.decay_shape=exponential cannot reach schedule.final_fraction=0. Use a fraction above 0, or linear."
        )


def _progress(now: int, start: int, last: int) -> float:
    """How far `now` is from `start` (0) to `last` (1), clamped."""
    if last <= start:
        return 1.0 if now >= last else 0.0
    return min(1.0, max(0.0, (now - start) / (last - start)))


def _between(shape: float, final: float) -> float:
    """A shape falling from 1 to 0, stretched to fall from 1 to `final`."""
    return final + (1 - final) * shape
