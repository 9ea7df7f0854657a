"""One optimizer step: microbatches through Megatron's forward-backward schedule, gradients finished, weights updated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from train.engine import Engine, run_schedule
from train.optim.optimizer import set_learning_rate
from train.record.stopwatch import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, still on the device."""

    loss: torch.Tensor
    """This rank's share of the mean loss: summed over the world it is the step's mean loss, in nats per token."""
    grad_norm: float
    """Norm of the whole gradient before clipping; the same on every rank."""
    parts: torch.Tensor
    """This rank's share of what the objective reports beside the loss (`Engine.loss_parts`), summed likewise."""


def train_step(
    engine: Engine,
    microbatches: list[Any],
    *,
    step: int,
    learning_rate: float,
    watch: Stopwatch,
    measure: bool = False,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """One update of the weights. Collective over the world.

    step: steps finished before this one. measure: take readings of quantised operands (`engine.precision.health`).
    before_update: called when gradients are done and weights and moments are still the last step's.
    """
    tokens = len(microbatches) * engine.microbatch_rows * engine.mesh.layout.data * engine.row_tokens
    engine.precision.begin_step(step=step, tokens=step * tokens, measure=measure)
    for chunk in engine.chunks:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    reports = run_schedule(engine, microbatches, forward_step=engine.forward_step)
    # One report a microbatch: the loss, then its parts.
    total = torch.zeros(1 + len(engine.loss_parts), device=engine.mesh.device)
    if reports:
        total = torch.stack(reports).view(len(reports), -1).sum(0)
    # Tensor ranks all hold the same loss, data ranks a share each: divided so that the sum over the world is the mean.
    total = total / (len(microbatches) * engine.mesh.layout.data * engine.mesh.layout.tensor)
    watch.lap("forward_backward")
    if before_update is not None:
        before_update()
        watch.lap("staging")
    set_learning_rate(engine.optimizer, learning_rate)
    _succeeded, grad_norm, _zeros = engine.optimizer.step()
    engine.precision.finish_step()
    watch.lap("optimizer")
    return StepResult(loss=total[0], parts=total[1:], grad_norm=grad_norm)
