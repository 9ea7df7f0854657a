"""The next-token objective: mean cross-entropy of a step's labels, in nats."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from train.model.attention import zigzag_positions
from train.model.context import RowContext
from train.parallel.mesh import Mesh


@dataclass(frozen=True)
class LocalRows:
    """This context rank's part of one microbatch, token ids [rows, tokens of this rank]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    context: RowContext | None


def local_rows(batch: Any, mesh: Mesh, *, reset_at_documents: bool) -> LocalRows:
    """Select this context rank's part of a `data.batch.Batch` and move it to the device."""
    tokens = batch.tokens.to(mesh.device, non_blocking=True)
    labels = batch.labels.to(mesh.device, non_blocking=True)
    groups = mesh.groups.cp
    where = zigzag_positions(tokens.shape[1], rank=groups.rank(), ranks=groups.size(), device=mesh.device)
    if groups.size() > 1:
        tokens, labels = tokens[:, where].contiguous(), labels[:, where].contiguous()
    context = None
    if reset_at_documents:
        context = RowContext(documents=batch.document_index.to(mesh.device, non_blocking=True))
    return LocalRows(tokens=tokens, labels=labels, positions=where.expand_as(tokens), context=context)


def forward_step(
    mesh: Mesh, *, reset_at_documents: bool
) -> Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]]:
    """The function that Megatron's schedules call for each microbatch: run the model and return (output, loss function).

    The loss is the sum over this rank's tokens divided by the tokens of the whole rows, so that its sum over context ranks
    is the microbatch's mean. Megatron divides by the number of microbatches, averages over data and context ranks, and
    multiplies by the context degree to undo the latter.
    """
    context_ranks = mesh.groups.cp.size()

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        rows = local_rows(next(microbatches), mesh, reset_at_documents=reset_at_documents)
        output = model(rows.tokens, rows.positions, None, labels=rows.labels, packed_seq_params=rows.context)

        def loss_of(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss = token_losses.sum() / (token_losses.numel() * context_ranks)
            return loss, loss.detach().clone()

        return output, loss_of

    return step
