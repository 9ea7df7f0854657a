"""The built model and its optimizer as one object, and the function that runs microbatches through it."""

import train.megatron  # noqa: F401  prepares Megatron before the imports below

# isort: split
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from train.parallel.mesh import Mesh
from train.parallel.wrap import Reduction
from train.precision.control import PrecisionControl


@dataclass(frozen=True)
class Engine:
    """Everything a training step needs; built once (`train.build.build_engine`)."""

    mesh: Mesh
    chunks: list[Any]
    """DDP-wrapped parts of the model on this rank, one per virtual pipeline stage."""
    optimizer: MegatronOptimizer
    precision: PrecisionControl
    forward_step: Callable[..., Any]
    """Called by Megatron's schedules for each microbatch (`train.objective`)."""
    counter: Callable[[Any], tuple[int, ...]]
    """What the objective counts in rows (`train.objective.step_counts`)."""
    row_tokens: int
    microbatch_rows: int
    reset_at_documents: bool
    prepare: Callable[[list[Any]], list[Any]] | None = None
    """What this rank's microbatches get before a step, such as the reference's log-probabilities. Collective over the world."""
    check: Callable[[list[Any]], None] | None = None
    """What is checked about this rank's microbatches after their passes and before the weights change. Collective over the
    world."""
    reduction: Reduction | None = None
    """None if nothing is trained (`train.build.frozen_engine`)."""
    loss_parts: tuple[str, ...] = ()
    """Names of the terms that the objective reports in addition to the loss."""
    teacher: dict[str, Any] | None = None
    """Identity of the teacher's weights (`recipes.schema.facts.identity_of`); None without a teacher."""


def live_model(engine: Engine) -> Any:
    """The model that trains, for inference between two steps: its only chunk on this rank, with up-to-date weights. For layouts
    without pipeline ranks. Collective over the data-parallel group if parameters are gathered late."""
    (chunk,) = engine.chunks
    if chunk.ddp_config.overlap_param_gather:
        chunk.start_param_sync(force_sync=True)  # inference does not call the modules whose hooks would wait for it
    return chunk.module


def run_schedule(
    engine: Engine, microbatches: list[Any], *, forward_step: Callable[..., Any], forward_only: bool = False
) -> list[torch.Tensor]:
    """Run this rank's microbatches through Megatron's schedule; gradients end up reduced in the DDP buffers.

    -> on the last pipeline stage, the report of `forward_step`'s loss function for each microbatch; else empty.
    Collective over the pipeline, tensor and context groups; unless forward_only, over the data groups too.
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
