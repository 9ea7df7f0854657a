"""The objective of GRPO: the policy loss (`train.align.losses.policy`) of answers that are packed in rows.

    PolicyRows --model--> nats of every label --places of the answers' tokens--> log p [B, T] --policy_loss--> share of the loss

Shapes: B answers of a microbatch, T tokens of the longest one. Each answer is in one row, whole, after its prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recipes.schema.align import GrpoConfig
from train.align.log_prob_gap import GapCheck
from train.align.losses.policy import Answers, policy_loss
from train.objective.next_token import Rows, local_rows
from train.parallel.mesh import Mesh

PARTS = ("kl", "clipped_low", "clipped_high", "capped")
"""What a step reports in addition to its loss: the mean of the KL estimate over its tokens, and shares of its tokens."""


@dataclass(frozen=True)
class PolicyRows:
    """One microbatch. The model reads the same fields as of a `data.batch.Batch`; all tensors are on the CPU."""

    tokens: torch.Tensor
    """[rows, row_tokens] int64."""
    labels: torch.Tensor
    """[rows, row_tokens] int64: the next token of an answer, otherwise -1."""
    document_index: torch.Tensor
    """[rows, row_tokens] int32."""
    places: torch.Tensor
    """[B, T] int64: index of each answer's tokens among the labels of all rows."""
    mask: torch.Tensor
    """[B, T] bool: tokens that count."""
    advantages: torch.Tensor
    """[B] float32"""
    old: torch.Tensor | None
    """[B, T] float32: log p of the policy when the batch began; None: this update is the first, so its own."""
    drawn: torch.Tensor
    """[B, T] float32: log p when the answers were drawn."""
    reference: torch.Tensor | None
    """[B, T] float32; None without a reference."""
    step_tokens: int
    """Tokens that count in all microbatches and data ranks of the step."""
    step_answers: int
    scale: int
    """Microbatches of the step on all data ranks: Megatron and `train_step` divide by their number."""
    numbers: list[int]
    """Number in the batch of each answer."""
    check: GapCheck | None
    """Gets the log p that this update computes; None if they have been checked before."""
    learned: None = None
    """As in a `Batch`; always None, because `mask` says what counts."""
    media: None = None
    """As in a `Batch`; prompts have none."""


def policy_step(config: GrpoConfig, *, mesh: Mesh) -> Callable[..., Any]:
    """The function that Megatron's schedules call for each microbatch. It reports [loss, *PARTS]."""

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch: PolicyRows = next(microbatches)
        losses_BS = token_losses(model, batch, mesh=mesh, temperature=config.temperature)

        def loss_of(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            device = losses_BS.device
            reference = batch.reference
            log_probs = -losses_BS.reshape(-1)[batch.places.to(device)]
            if batch.check is not None:
                batch.check.add(batch.numbers, log_probs)
            answers = Answers(
                log_probs=log_probs,
                old_log_probs=batch.old.to(device) if batch.old is not None else log_probs.detach(),
                mask=batch.mask.to(device),
                advantages=batch.advantages.to(device),
                reference_log_probs=reference.to(device) if reference is not None else None,
                sampler_log_probs=batch.drawn.to(device),
            )
            found = policy_loss(answers, config, step_tokens=batch.step_tokens, step_answers=batch.step_answers)
            sums = torch.stack([found.kl, found.clipped_low, found.clipped_high, found.capped]).float()
            parts = sums / max(1, batch.step_tokens)
            return found.loss * batch.scale, torch.cat([found.loss.detach()[None], parts]) * batch.scale

        return losses_BS, loss_of

    return step


def finish_check(microbatches: list[PolicyRows]) -> None:
    """Compare the log p of an update with the sampler's, if that was left to the update. NumericsError on every rank if they
    differ too much. Collective over the world."""
    if (check := microbatches[0].check) is not None:
        check.finish()


def token_losses(model: Any, batch: Rows, *, mesh: Mesh, temperature: float = 1.0) -> torch.Tensor:
    """-log p of every label at a temperature, [rows, row_tokens]: the forward pass of training, with the arithmetic of
    generation (`RowContext.is_stepwise`). model: wrapped or not.

    Collective over the tensor group.
    """
    chunk = getattr(model, "module", model)
    rows = local_rows(batch, mesh, reset_at_documents=True)
    assert rows.context is not None
    rows.context.is_stepwise = True
    before, chunk.temperature = chunk.temperature, temperature
    try:
        losses: torch.Tensor = model(
            rows.tokens, rows.positions, None, labels=rows.labels, packed_seq_params=rows.context
        )
    finally:
        chunk.temperature = before
    return losses
