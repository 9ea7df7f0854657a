"""One optimizer step: run the microbatches through Megatron's forward-backward schedule, then update the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recipes.schema.errors import DataError
from train.engine import Engine, run_schedule
from train.model.experts import start_counting, update_biases
from train.objective.next_token import count_labels
from train.objective.several_tokens import CountAhead
from train.objective.step_counts import count_step
from train.optim.optimizer import set_learning_rate
from train.record.profile import phase
from train.record.stopwatch import Stopwatch
from train.resilience.spikes import Spike, SpikeWatch


@dataclass(frozen=True)
class StepResult:
    """Results of one step; tensors are still on the device."""

    loss: torch.Tensor
    """This rank's share of the mean loss: its sum over the world is the step's mean loss, in nats per token."""
    grad_norm: float
    """Norm of the whole gradient before clipping; the same on every rank."""
    parts: torch.Tensor
    """This rank's share of the objective's other terms (`Engine.loss_parts`); sum them in the same way."""
    labels: int | None = None
    """Learned labels of the whole step; None if every label is learned."""
    spike: Spike | None = None
    """Why neither weights nor moments have changed; None if they have."""


def train_step(
    engine: Engine,
    microbatches: list[Any],
    *,
    step: int,
    learning_rate: float,
    watch: Stopwatch,
    measure: bool = False,
    before_update: Callable[[], None] | None = None,
    after_reduction: Callable[[], None] | None = None,
    spikes: SpikeWatch | None = None,
) -> StepResult:
    """One update of the weights. Collective over the world.

    step: steps finished before this one. measure: take readings of quantised operands (`engine.precision.health`).
    DataError for a step without a learned label, before the weights change.

    before_update: called after this rank's backward passes and before weights, moments or experts' biases change.
    after_reduction: called when the gradients are summed, before they are used.
    spikes: decides whether they change. NumericsError if too many steps in a row may not.
    """
    tokens = len(microbatches) * engine.microbatch_rows * engine.mesh.layout.data * engine.row_tokens
    engine.precision.begin_step(step=step, tokens=step * tokens, measure=measure)
    for chunk in engine.chunks:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    start_counting(engine.chunks)
    if engine.prepare is not None:
        microbatches = engine.prepare(microbatches)
    microbatches, sums = count_step(engine.mesh, microbatches, engine.counter)
    if engine.reduction is not None:
        engine.reduction.before = lambda: _before_reduction(watch, before_update)
        engine.reduction.after = after_reduction
    with phase("forward and backward"):
        reports = run_schedule(engine, microbatches, forward_step=engine.forward_step)
    if engine.check is not None:
        engine.check(microbatches)
    if sums is not None and not sums()[0]:
        raise DataError(
            f"step {step + 1:,} has no label that is learned, so it has no loss. `stratum trace --step {step + 1}` shows its "
            f"rows: answers cut off by data.chat.long_record=cut look like this. Use more rows a step, or long_record=drop."
        )
    # Each report is [loss, *parts].
    total = torch.zeros(1 + len(engine.loss_parts), device=engine.mesh.device)
    if reports:
        total = torch.stack(reports).view(len(reports), -1).sum(0)
    # Tensor ranks have equal losses, data ranks have different rows: divide so that the sum over the world is the mean.
    total = total / (len(microbatches) * engine.mesh.layout.data * engine.mesh.layout.tensor)
    watch.lap("reduction")
    counts_labels = engine.counter is count_labels or isinstance(engine.counter, CountAhead)
    labels = sums()[0] if sums is not None and counts_labels and microbatches[0].learned is not None else None
    if spikes is not None and (spike := _spike(engine, total[0], step=step + 1, spikes=spikes)) is not None:
        watch.lap("optimizer")
        return StepResult(loss=total[0], parts=total[1:], grad_norm=spike.grad_norm, labels=labels, spike=spike)
    update_biases(engine.chunks, engine.mesh.groups.tp_dp_cp)
    set_learning_rate(engine.optimizer, learning_rate)
    with phase("optimizer"):
        _succeeded, grad_norm, _zeros = engine.optimizer.step()
    engine.precision.finish_step()
    watch.lap("optimizer")
    return StepResult(loss=total[0], parts=total[1:], grad_norm=grad_norm, labels=labels)


def _before_reduction(watch: Stopwatch, before_update: Callable[[], None] | None) -> None:
    watch.lap("forward_backward")
    if before_update is not None:  # here, not after the reduction, which also updates the biases of experts
        before_update()
        watch.lap("staging")


def _spike(engine: Engine, share: torch.Tensor, *, step: int, spikes: SpikeWatch) -> Spike | None:
    """The step as a spike, the same on every rank; None if its update may be made. share: this rank's share of the loss.
    Collective over the world."""
    # The optimizer computes the norm again for clipping: one pass over this rank's gradients, only with this policy.
    engine.optimizer.prepare_grads()
    grad_norm = float(engine.optimizer.get_grad_norm())
    loss = float(engine.mesh.sum_over_world(share.detach().clone()))
    reason = spikes.reason(loss, grad_norm)
    # A rank whose arithmetic is damaged may decide otherwise. All ranks do what one of them demands.
    if engine.mesh.any_rank(reason is not None):
        reason = reason or "another rank found its loss or gradient norm not finite or an outlier, and this one did not"
    spikes.note(step, loss=loss, grad_norm=grad_norm, refused=reason)
    return Spike(step, reason, loss, grad_norm) if reason is not None else None
