"""Everything that happens at a step, in order, on one page.

    rows --> forward, backward, update --> record --> evaluate when due --> save when due --> stop when asked

The loop's whole state is two integers, `step` and `position`; everything else is in the engine or on disk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.stream import Stream
from train.config import Recipe
from train.engine import Engine
from train.faults import StopSignals, check_numbers
from train.optim.schedule import learning_rate_factor
from train.step import train_step
from train.stopwatch import Stopwatch
from train.telemetry import Telemetry


@dataclass(frozen=True)
class LoopEnd:
    """Where and why the loop stopped."""

    step: int
    reason: str
    """"finished", "paused" (run.stop_after_steps) or the name of the signal that asked."""


def train_loop(
    recipe: Recipe,
    *,
    engine: Engine,
    stream: Stream,
    telemetry: Telemetry,
    first_step: int,
    evaluate: Callable[[int], None],
    save: Callable[[int, int], None],
    is_save_due: Callable[[int], bool],
    newest_checkpoint: Callable[[], str | None],
) -> LoopEnd:
    """Train from step `first_step` (steps already finished) to `recipe.run.steps`. Collective over the world.

    evaluate(step), save(step, position): called on every rank. Raises NumericsError, CheckpointError, DataError.
    """
    run, mesh = recipe.run, engine.mesh
    step, saved_step = first_step, first_step
    tokens_per_step = run.global_rows * engine.row_tokens
    last_step = run.steps
    if run.stop_after_steps is not None:
        last_step = min(last_step, first_step + run.stop_after_steps)

    def is_measured(at: int) -> bool:
        """Whether the step that ends as step `at` is one of those whose quantisation errors are looked at."""
        return recipe.precision.health and at % recipe.telemetry.log_every_steps == 0

    with StopSignals() as signals:
        while step < last_step:
            watch = Stopwatch()
            microbatches: list[Any] = next(stream)
            watch.lap("data")

            factor = learning_rate_factor(
                recipe.schedule,
                step=step,
                tokens=step * tokens_per_step,
                total_steps=run.steps,
                tokens_per_step=tokens_per_step,
            )
            result = train_step(
                engine,
                microbatches,
                step=step,
                learning_rate=recipe.optim.lr * factor,
                watch=watch,
                measure=is_measured(step + 1),
            )
            step += 1
            telemetry.record(
                step,
                loss=result.loss,
                parts=result.parts,
                grad_norm=result.grad_norm,
                learning_rate=recipe.optim.lr * factor,
                seconds=watch.seconds(),
            )
            if is_measured(step):
                telemetry.flush()
                telemetry.precision(
                    step,
                    scaling=engine.precision.active(),
                    readings=engine.precision.health(),
                    policy=recipe.precision.health_policy,
                )
            if not math.isfinite(result.grad_norm):
                telemetry.flush()  # the steps that led here are the ones to look at
            check_numbers(step, grad_norm=result.grad_norm, newest_checkpoint=newest_checkpoint())

            if recipe.evaluate.every_steps and step % recipe.evaluate.every_steps == 0 and step < run.steps:
                telemetry.flush()
                evaluate(step)
            if is_save_due(step):
                telemetry.flush()
                save(step, stream.position)
                saved_step = step
            if mesh.any_rank(signals.received is not None):
                break

        telemetry.flush()
        if step > saved_step:
            save(step, stream.position)
        received = signals.received
    if step >= run.steps:
        evaluate(step)
        return LoopEnd(step, "finished")
    return LoopEnd(step, received.name if received is not None else "paused")
