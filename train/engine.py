"""The built model and its optimizer, as one value that tools and the step share, and how microbatches run through it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from train.parallel.mesh import Mesh
from train.precision.control import PrecisionControl


@dataclass(frozen=True)
class Engine:
    """What a step needs, built once by `train.run`."""

    mesh: Mesh
    chunks: list[Any]
    """DDP-wrapped parts of the model on this rank, one per virtual pipeline stage."""
    optimizer: MegatronOptimizer
    precision: PrecisionControl
    forward_step: Callable[..., Any]
    """Called by Megatron's schedules for each microbatch (`train.objective`)."""
    row_tokens: int
    microbatch_rows: int
    reset_at_documents: bool
    loss_parts: tuple[str, ...] = ()
    """What the objective reports beside the loss."""
    teacher: dict[str, Any] | None = None
    """Whose answers it learns from (`train.distill.teacher.identity`); None where it learns from text alone."""


def run_schedule(
    engine: Engine, microbatches: list[Any], *, forward_step: Callable[..., Any], forward_only: bool = False
) -> list[torch.Tensor]:
    """Run this rank's microbatches through Megatron's schedule; gradients end up reduced in the DDP buffers.

    -> what the loss function of `forward_step` reported for each microbatch, on the last pipeline stage; else empty.
    Collective over the pipeline, tensor and context groups, and with gradients over the data groups.
    """
    layout = engine.mesh.layout
    schedule = get_forward_backward_func(
        pp_size=layout.pipeline, vp_size=layout.virtual if layout.virtual > 1 else None
    )
    iterators = [iter(microbatches) for _ in engine.chunks]
    reports = schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=engine.chunks if len(engine.chunks) > 1 else engine.chunks[0],
        num_microbatches=len(microbatches),
        seq_length=engine.row_tokens,
        micro_batch_size=engine.microbatch_rows,
        forward_only=forward_only,
    )
    return reports if engine.mesh.is_last_stage else []
