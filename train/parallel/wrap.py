"""Data parallelism of the model's chunks: Megatron's DDP with fp32 gradient buffers and the recipe's overlap options."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
    param_and_grad_buffer,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer

from recipes.schema.parallel import ParallelConfig
from train.parallel.mesh import Mesh


def wrap_chunks(
    chunks: list[Any], *, parallel: ParallelConfig, mesh: Mesh, fp8_weights: bool = False
) -> list[DistributedDataParallel]:
    """DDP around each chunk, sharing one config. Gradients are summed in fp32 and averaged over data and context ranks.

    fp8_weights: gather updated weights in FP8 (`te` only).

    Collective: parameters are broadcast from each data-parallel group's first rank.
    """
    _spare_collectives_with_oneself()
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=fp8_weights,
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=config,
            module=chunk,
            disable_bucketing=index > 0,
            pg_collection=mesh.groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


class Reduction:
    """The sum of the gradients over the data-parallel ranks at the end of a step's backward pass."""

    def __init__(self) -> None:
        self.before: Callable[[], None] | None = None
        """Called after this rank's backward passes; until then it has waited for no data-parallel rank."""
        self.after: Callable[[], None] | None = None
        """Called when the gradients are summed."""

    def __call__(self, *arguments: Any, **named: Any) -> None:
        if self.before is not None:
            self.before()
        finalize_model_grads(*arguments, **named)
        if self.after is not None:
            self.after()


def connect(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> Reduction:
    """Set the functions by which Megatron's schedules finish gradients and delay their reduction."""
    config = chunks[0].module.config
    reduction = Reduction()
    config.finalize_model_grads_func = reduction
    config.grad_scale_func = optimizer.scale_loss
    if chunks[0].ddp_config.overlap_grad_reduce:
        contexts = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = contexts if len(chunks) > 1 else contexts[0]
        if len(chunks) > 1:
            starts = [chunk.start_grad_sync for chunk in chunks]
            config.grad_sync_func = starts
    if chunks[0].ddp_config.overlap_param_gather:
        gathers = [chunk.start_param_sync for chunk in chunks]
        config.param_sync_func = gathers if len(chunks) > 1 else gathers[0]
    return reduction


def _spare_collectives_with_oneself() -> None:
    """Let a data-parallel group of one rank skip its reduce-scatter and all-gather.

    Input and output are then the same memory, but gloo still copies it twice: 6 % of a step of the smoke recipe.
    """

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: torch.Tensor, input: torch.Tensor, *args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
            if group.size() == 1 and output.data_ptr() == input.data_ptr():
                return None
            return collective(output, input, *args, group=group, **kwargs)

        return call

    param_and_grad_buffer.dist_all_gather_func = unless_alone(dist.all_gather_into_tensor)
    param_and_grad_buffer.dist_reduce_scatter_func = unless_alone(dist.reduce_scatter_tensor)
