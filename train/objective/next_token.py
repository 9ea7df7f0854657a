"""The next-token objective: mean cross-entropy of a step's labels, in nats. Supervised fine-tuning is this objective on chats,
where the labels that are learned are the assistant's (`Batch.learned`).

With a z-loss (`objective.z_loss`; PaLM, arXiv 2204.02311, section 5) the gradient is of

    mean over the labels of [cross-entropy + coefficient * (log sum exp logits)^2]

with the logits that the softmax sees, after a soft cap. Reported are the cross-entropy and, as a part, the other term.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from data.batch import MediaBatch
from train.model.attention import zigzag_positions
from train.model.context import RowContext
from train.parallel.mesh import Mesh


class Rows(Protocol):
    """What the model reads of a microbatch: of a `data.batch.Batch`, or of rows made for scoring or sampling. Fields as there."""

    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def labels(self) -> torch.Tensor: ...
    @property
    def document_index(self) -> torch.Tensor | None: ...
    @property
    def learned(self) -> torch.Tensor | None: ...
    @property
    def media(self) -> MediaBatch | None: ...


@dataclass(frozen=True)
class LocalRows:
    """This context rank's part of one microbatch, token ids [rows, tokens of this rank]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    learned: torch.Tensor | None
    """Labels that are learned; None: all."""
    context: RowContext | None


def local_rows(batch: Rows, mesh: Mesh, *, reset_at_documents: bool) -> LocalRows:
    """Select this context rank's part of a microbatch and move it to the device."""
    tokens = batch.tokens.to(mesh.device, non_blocking=True)
    labels = batch.labels.to(mesh.device, non_blocking=True)
    groups = mesh.groups.cp
    where = zigzag_positions(tokens.shape[1], rank=groups.rank(), ranks=groups.size(), device=mesh.device)
    learned = batch.learned
    if learned is not None:
        learned = learned.to(mesh.device, non_blocking=True)
    if groups.size() > 1:
        tokens, labels = tokens[:, where].contiguous(), labels[:, where].contiguous()
        learned = None if learned is None else learned[:, where]
    context = None
    if reset_at_documents or batch.media is not None:
        documents = None
        if reset_at_documents:
            assert batch.document_index is not None, "rows without document_index cannot keep documents apart"
            documents = batch.document_index.to(mesh.device, non_blocking=True)
        context = RowContext(documents=documents, media=batch.media)
    return LocalRows(tokens, labels, positions=where.expand_as(tokens), learned=learned, context=context)


Z_LOSS_PARTS = ("z_loss",)


def forward_step(
    mesh: Mesh, *, reset_at_documents: bool, z_loss: float = 0.0
) -> Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]]:
    """The function that Megatron's schedules call for each microbatch: run the model and return (output, loss function).

    The loss is the sum over this rank's tokens divided by the tokens of the whole rows, so that its sum over context ranks
    is the microbatch's mean. Megatron divides by the number of microbatches, averages over data and context ranks, and
    multiplies by the context degree to undo the latter.

    Where not all labels are learned, microbatches differ in how many are, and the sum is divided by the mean number of learned
    labels of the step's microbatches (`train.objective.step_counts`) instead.

    z_loss: its coefficient. If it is not 0, the report is [loss, *Z_LOSS_PARTS].
    """
    context_ranks = mesh.groups.cp.size()

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch = next(microbatches)
        rows = local_rows(batch, mesh, reset_at_documents=reset_at_documents)
        output = model(
            rows.tokens,
            rows.positions,
            None,
            labels=rows.labels,
            packed_seq_params=rows.context,
            **({"log_sums": True} if z_loss else {}),
        )

        def mean(token_losses: torch.Tensor) -> torch.Tensor:
            if rows.learned is None:
                return token_losses.sum() / (token_losses.numel() * context_ranks)
            return torch.where(rows.learned, token_losses, 0).sum() / batch.per_microbatch()[0]

        def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if not z_loss:
                loss = mean(output)
                return loss, loss.detach().clone()
            token_losses, log_sums = output
            terms = torch.stack([mean(token_losses), z_loss * mean(log_sums**2)])
            return terms.sum(), terms.detach().clone()

        return output, loss_of

    return step


def count_labels(batch: Any) -> tuple[int, ...]:
    """(number of labels that are learned,) of some rows, for `step_counts`; empty if all are."""
    return () if batch.learned is None else (int(batch.learned.sum()),)
