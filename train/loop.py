"""The training loop: everything that happens at a step, in order.

    rows --> forward, backward, update --> record --> evaluate if due --> save if due --> save events --> stop on a signal
         --> copy into memory if due

A background save and a copy in memory read the state while the next step runs forward and backward; only the update waits.

The loop's state is two integers, `step` and `position`; everything else is in the engine or on disk.
"""

import math
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from recipes.schema.evaluate import heldout_is_due, tasks_are_due
from recipes.schema.layout import stages_of
from recipes.schema.recipe import Recipe
from recipes.schema.schedule import learning_rate_factor
from train.checkpoint.manager import CheckpointFolder
from train.copies.memory_copies import MemoryCopies
from train.engine import Engine
from train.integrity.watch import Integrity
from train.model.experts import expert_loads
from train.parallel.mesh import Mesh
from train.record.profile import GarbageControl, Profiler, phase
from train.record.stopwatch import Stopwatch
from train.record.telemetry import Telemetry
from train.resilience.faults import WATCHED, StopSignals, check_grad_norm, check_losses, grace_warning, too_late
from train.resilience.spikes import Spike, SpikeWatch
from train.resilience.stragglers import WINDOW, Stragglers
from train.step import StepResult, train_step

_RANKS_RECORDED = 64
"""Ranks in a table of times: the slowest."""


class Microbatches(Protocol):
    """What the loop trains on: each call of `next` gives this rank's microbatches of a step."""

    @property
    def position(self) -> int:
        """Where the next step begins; saved in checkpoints."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps so far."""

    @property
    def step_tokens(self) -> int:
        """Tokens of the last step."""

    def __next__(self) -> list[Any]: ...


@dataclass(frozen=True)
class LoopEnd:
    """Where and why the loop stopped."""

    step: int
    reason: str
    """"finished", "paused" (run.stop_after_steps), "spike" or the name of the signal that stopped it."""
    spike: Spike | None = None
    """The step after which the run must go back (run.spikes.policy=rollback). Its update was not made."""
    received: signal.Signals | None = None
    """A stop signal that arrived during that step: the run goes back, then stops."""


def train_loop(
    recipe: Recipe,
    *,
    engine: Engine,
    stream: Microbatches,
    telemetry: Telemetry,
    first_step: int,
    evaluate: Callable[[int], None],
    checkpoints: CheckpointFolder,
    save: Callable[..., None],
    report: Callable[[Spike], None],
    profiler: Profiler,
    copies: MemoryCopies | None = None,
    copy: Callable[[int, int], None] | None = None,
    spikes: SpikeWatch | None = None,
    integrity: Integrity | None = None,
    received: signal.Signals | None = None,
    started_at: int | None = None,
) -> LoopEnd:
    """Train from step `first_step` (steps already finished) to `recipe.run.steps`. Collective over the world.

    evaluate(step), save(step, position, background=...), copy(step, position), report(skipped step): called on every rank.
    spikes: looks for spikes; None: only NaN and infinity, which end the run. integrity: looks for corrupted numbers.
    received: `LoopEnd.received` of the loop before: stop without a step. started_at: the step from which run.stop_after_steps
    counts, if the run has gone back since; None: `first_step`. Raises NumericsError, CheckpointError, DataError,
    CorruptionError.
    """
    run, mesh = recipe.run, engine.mesh
    step = first_step
    if integrity is not None:
        integrity.forget()
    tokens_per_step = run.global_rows * engine.row_tokens
    last_step = run.steps
    writing = False
    stragglers = Stragglers(stages_of(mesh.layout)) if mesh.layout.data > 1 else None
    watches: list[Stopwatch] = []
    flags_of_all_ranks: Callable[[], list[bool]]
    if run.stop_after_steps is not None:
        last_step = min(last_step, (first_step if started_at is None else started_at) + run.stop_after_steps)

    def flush() -> None:
        """Write the recorded steps and check their losses. Losses are read from the device only at a flush, so that no step
        waits for it; a flush precedes every save."""
        telemetry.flush()
        check_losses(telemetry.not_finite, advice=lambda: checkpoints.advice(mesh))

    def is_measured(at: int) -> bool:
        """Whether quantisation error is measured at step `at`."""
        return recipe.precision.health and at % recipe.telemetry.log_every_steps == 0

    def before_update() -> None:
        """Start the all-reduce of the flags for signals and saves. It runs during the update, so no step waits for it. A signal
        that arrives later is seen in the next step."""
        nonlocal flags_of_all_ranks
        checkpoints.before_update()
        if copies is not None:
            copies.before_update()
        flags_of_all_ranks = mesh.begin_any_of(
            *(signals.received == number for number in WATCHED),
            checkpoints.is_writing,
            checkpoints.has_failed,
            copies is not None and copies.is_copying,
            copies is not None and copies.has_failed,
            checkpoints.storage_has_failed,
        )

    with StopSignals() as signals, GarbageControl(run.garbage_every_steps) as garbage:
        while step < last_step and received is None:
            profiler.before_step(step + 1)
            watch = Stopwatch(mesh.device)
            with phase("data"):
                microbatches: list[Any] = next(stream)
            watch.lap("data")

            factor = learning_rate_factor(
                recipe.schedule,
                step=step,
                tokens=step * tokens_per_step,
                total_steps=run.steps,
                tokens_per_step=tokens_per_step,
            )
            rate = recipe.optim.lr * factor

            def take(
                before: Callable[[], None],
                after: Callable[[], None] | None = None,
                at: int = step,
                rows: Any = microbatches,
                rate: float = rate,
            ) -> StepResult:
                return train_step(
                    engine,
                    rows,
                    step=at,
                    learning_rate=rate,
                    watch=watch,  # noqa: B023  used within this iteration only
                    measure=is_measured(at + 1),
                    before_update=before,
                    after_reduction=after,
                    spikes=spikes,
                )

            if integrity is None:
                result = take(before_update)
            else:
                result = integrity.take(step + 1, microbatches, before_update=before_update, train=take)
            if result.spike is not None and run.spikes.policy == "rollback":
                telemetry.flush()
                flags_of_all_ranks()
                signalled = mesh.any_of(*(signals.received == number for number in WATCHED))
                _record_saves(telemetry, checkpoints, recipe=recipe)
                stopped_by = WATCHED[signalled.index(True)] if any(signalled) else None
                return LoopEnd(step, "spike", result.spike, stopped_by)
            step += 1
            garbage.after_step(step)
            if (trace := profiler.after_step(step)) is not None:
                telemetry.event("profile", step=step, path=str(trace))
            telemetry.record(
                step,
                loss=result.loss,
                parts=result.parts,
                grad_norm=result.grad_norm,
                learning_rate=rate,
                seconds=watch.seconds,
                tokens=stream.tokens,
                step_tokens=stream.step_tokens,
                labels=result.labels,
                counts=_counts(spikes),
                is_skipped=result.spike is not None,
            )
            watches.append(watch)
            if len(watches) == WINDOW:
                if stragglers is not None:
                    _compare_ranks(telemetry, stragglers, mesh=mesh, watches=watches, step=step)
                watches.clear()
            if result.spike is not None:
                telemetry.flush()
                report(result.spike)
            if is_measured(step):
                telemetry.flush()
                telemetry.precision(
                    step,
                    scaling=engine.precision.active(),
                    readings=engine.precision.health(),
                    policy=recipe.precision.health_policy,
                )
            if step % recipe.telemetry.log_every_steps == 0:
                telemetry.experts(step, expert_loads(engine.chunks, mesh))
            if result.spike is None and not math.isfinite(result.grad_norm):
                telemetry.flush()  # record the steps before the failure
                check_grad_norm(step, grad_norm=result.grad_norm, advice=lambda: checkpoints.advice(mesh))
            check_losses(telemetry.not_finite, advice=lambda: checkpoints.advice(mesh))

            if step < run.steps and (
                heldout_is_due(recipe.evaluate, step, steps=run.steps)
                or tasks_are_due(recipe.evaluate, step, steps=run.steps)
            ):
                flush()
                evaluate(step)
            if checkpoints.is_due(step) and step < last_step:
                flush()
                save(step, stream.position, background=recipe.checkpoint.background)
            # All ranks get the same flags, so they all break, raise or continue together.
            *signalled, writing, failed, is_copying, copy_failed, storage_failed = flags_of_all_ranks()
            _record_saves(telemetry, checkpoints, recipe=recipe, watch=watch)
            if failed and not writing:
                checkpoints.check()
            if storage_failed:
                checkpoints.check_storage()
            if any(signalled):
                received = WATCHED[signalled.index(True)]
                break
            if copies is not None and copies.is_on and copy_failed:
                telemetry.event("warning", text=copies.turn_off())
            if copies is not None and copy is not None and copies.is_due(step) and step < last_step and not is_copying:
                flush()
                copy(step, stream.position)

        flush()
        checkpoints.wait()
        saved = checkpoints.saved_step if writing and not checkpoints.has_failed else None
        if received is not None and saved is not None and step < run.steps:
            text = too_late(
                signals.since_s, save_s=checkpoints.save_s, grace_s=_grace_s(recipe, received), step=step, saved_step=saved
            )  # fmt: skip
            (is_too_late,) = mesh.any_of(text is not None)
            if is_too_late:
                telemetry.event("warning", text=text or "another rank has no time left for another save")
                step = saved
        if (
            step > 0 and checkpoints.saved_step != step
        ):  # also without a step here: a run continued from memory is not saved
            save(step, stream.position, background=False)
        _record_saves(telemetry, checkpoints, recipe=recipe)
        checkpoints.check(always=True)
        if step >= run.steps:
            # Still inside StopSignals: the state is saved, so a first signal does not interrupt the evaluation.
            evaluate(step)
        if run.storage is not None:
            checkpoints.finish_storage(mesh)
            _record_saves(telemetry, checkpoints, recipe=recipe)
            if mesh.any_rank(checkpoints.storage_has_failed):
                checkpoints.check_storage()
    if step >= run.steps:
        return LoopEnd(step, "finished")
    return LoopEnd(step, received.name if received is not None else "paused")


def _compare_ranks(
    telemetry: Telemetry, stragglers: Stragglers, *, mesh: Mesh, watches: Sequence[Stopwatch], step: int
) -> None:
    """Record each rank's median time of forward and backward passes, and warn about slow ranks. Collective over the world."""
    ranks = mesh.gather_objects([max(1e-9, watch.seconds()["forward_backward"]) for watch in watches])
    medians = [statistics.median(seconds) for seconds in ranks]
    slowest = sorted(range(len(ranks)), key=lambda rank: -medians[rank])[:_RANKS_RECORDED]
    table = {str(rank): medians[rank] for rank in slowest}
    telemetry.event("ranks", step=step, steps=len(watches), forward_backward_s=table)
    for slow in stragglers.window(ranks):
        telemetry.event("warning", text=f"step {step:,}: {slow} (forward and backward, {2 * len(watches)} steps)")


def _counts(spikes: SpikeWatch | None) -> dict[str, int]:
    """What steps record about spikes so far."""
    if spikes is None:
        return {}
    return {"skipped_steps": len(spikes.ledger.skipped_steps), "rollbacks": spikes.ledger.rollbacks}


def _grace_s(recipe: Recipe, received: signal.Signals) -> float:
    """How long a run has after a signal. Slurm sends SIGUSR1 before a job's time limit."""
    launch = recipe.launch
    return min(launch.grace_s, launch.slurm.save_before_end_s) if received == signal.SIGUSR1 else launch.grace_s


def _record_saves(
    telemetry: Telemetry, checkpoints: CheckpointFolder, *, recipe: Recipe, watch: Stopwatch | None = None
) -> None:
    """Record events of the current save (requested, staged, durable, retried, failed) and of copies to storage."""
    for event in checkpoints.collect():
        telemetry.event(event.kind, step=event.step, **event.fields)
        if event.kind == "save":
            late = grace_warning(
                sum(watch.seconds().values()) if watch is not None else 0.0,
                save_s=event.fields["seconds"],
                grace_s=recipe.launch.grace_s,
                before_end_s=recipe.launch.slurm.save_before_end_s,
            )
            if late is not None and checkpoints.is_first_warning():
                telemetry.event("warning", text=late)
