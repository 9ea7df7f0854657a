"""The next-token objective of a model with further depths (`model.mtp`): each depth's cross-entropy is added to the loss.

    loss = next-token loss + loss_scale / depths x sum over depths of the depth's mean cross-entropy

(arXiv 2412.19437, equations 24 and 25; Megatron-Core's `process_mtp_loss`.) The mean is over the labels of the step that exist
for the depth: in the row, in the same document, learned. Reported is the next-token loss; the depths are its parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recipes.schema.mtp import MtpConfig
from train.model.attention import zigzag_positions
from train.model.mtp import Ahead
from train.objective.next_token import local_rows
from train.parallel.mesh import Mesh


def parts_of(mtp: MtpConfig) -> tuple[str, ...]:
    """Names of what is reported next to the loss: mean loss of each further depth, and the share of its guesses that is right."""
    depths = range(1, mtp.depths + 1)
    return (*(f"mtp_{depth}" for depth in depths), *(f"mtp_{depth}_right" for depth in depths))


def ahead_of(batch: Any, depths: int, *, reset_at_documents: bool) -> Ahead:
    """Tokens and labels of the further depths for whole rows of a `data.batch.Batch`, where it is."""
    labels, documents = batch.labels, batch.document_index
    here = torch.ones_like(labels, dtype=torch.bool) if batch.learned is None else batch.learned
    tokens = _shifted(batch.tokens, depths)
    targets, learned = _shifted(labels, depths), _shifted(here, depths)
    if reset_at_documents:
        # The label of token t + k is token t + k + 1, so the document of its input decides, as for the next token.
        learned &= _shifted(documents, depths) == documents
    return Ahead(tokens, targets, learned)


def local_ahead(batch: Any, depths: int, mesh: Mesh, *, reset_at_documents: bool) -> Ahead:
    """`ahead_of` for this context rank's part of the rows, on the device (as `next_token.local_rows`)."""
    whole = ahead_of(batch, depths, reset_at_documents=reset_at_documents)
    groups, device = mesh.groups.cp, whole.tokens_DBS.device
    where = zigzag_positions(batch.tokens.shape[1], rank=groups.rank(), ranks=groups.size(), device=device)
    parts = (whole.tokens_DBS, whole.labels_DBS, whole.learned_DBS)
    return Ahead(*(part[..., where].to(mesh.device, non_blocking=True) for part in parts))


def _shifted(x_BS: torch.Tensor, depths: int) -> torch.Tensor:
    """x[:, t + k] for k = 1 ... depths, [D, B, S]; 0 beyond the row."""
    found = x_BS.new_zeros(depths, *x_BS.shape)
    for k in range(1, depths + 1):
        found[k - 1, :, :-k] = x_BS[:, k:]
    return found


@dataclass(frozen=True)
class CountAhead:
    """Counts labels of rows: (of the next token, of each further depth), for `step_counts`."""

    depths: int
    reset_at_documents: bool

    def __call__(self, batch: Any) -> tuple[int, ...]:
        """batch: a `data.batch.Batch`."""
        learned = ahead_of(batch, self.depths, reset_at_documents=self.reset_at_documents).learned_DBS
        first = batch.labels.numel() if batch.learned is None else int(batch.learned.sum())
        return first, *learned.sum((1, 2)).tolist()


def forward_step(mesh: Mesh, mtp: MtpConfig, *, reset_at_documents: bool) -> Callable[..., Any]:
    """The function that Megatron's schedules call for each microbatch, as `next_token.forward_step`; it reports
    [next-token loss, *parts_of]."""

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch = next(microbatches)
        rows = local_rows(batch, mesh, reset_at_documents=reset_at_documents)
        ahead = local_ahead(batch, mtp.depths, mesh, reset_at_documents=reset_at_documents)
        output = model(
            rows.tokens, rows.positions, None, labels=rows.labels, ahead=ahead, packed_seq_params=rows.context
        )

        def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            next_losses, further = output[0], output[1:].unflatten(0, (2, mtp.depths))
            count, *counts = batch.per_microbatch()
            if rows.learned is not None:
                next_losses = torch.where(rows.learned, next_losses, 0)
            loss = next_losses.sum() / count
            sums = torch.where(ahead.learned_DBS, further, 0).sum((2, 3))
            losses, right = sums / sums.new_tensor(counts)
            report = torch.cat([loss[None], losses, right]).detach().clone()
            return loss + mtp.loss_scale / mtp.depths * losses.sum(), report

        return output, loss_of

    return step
