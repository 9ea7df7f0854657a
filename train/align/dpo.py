"""The DPO objective: the better of two answers becomes more likely than the worse one, compared with a reference.

    rows --model--> loss of each token --sum by document, learned tokens only--> log p of each answer  [rows, documents]
                                             Batch.reference: the same under the reference            --pairs--> loss

The answers to one context are documents of one row, so no data rank needs another rank's rows. Context ranks have parts of each
answer: their sums are added up. Shapes: B rows, S tokens of this context rank, D documents, N pairs.
"""

import train.megatron  # noqa: F401  prepares Megatron before the imports below

# isort: split
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

from recipes.schema.align import DpoConfig
from train.align.losses.preference import PairLogProbs, RankedPairs, dpo_loss, implicit_rewards
from train.objective.next_token import LocalRows, local_rows
from train.parallel.mesh import Mesh

DPO_PARTS = ("preference", "sft", "chosen_reward", "rejected_reward", "margin", "accuracy")
"""What is reported next to the loss: its two terms (`sft` in nats per token of the chosen answers); mean implicit rewards of the
better and the worse answers, their difference, and the share of pairs in the right order (equal rewards count half)."""


def answer_log_probs(token_losses_BS: torch.Tensor, rows: LocalRows, documents: int, *, mesh: Mesh) -> torch.Tensor:
    """Log-probability of the learned tokens of each document, [B, D] float64, on every context rank. Collective over the context
    group; its backward pass keeps each rank's own tokens."""
    assert rows.learned is not None and rows.context is not None, "rows of preferences"
    assert rows.context.documents is not None, "rows of preferences"
    documents_BS: torch.Tensor = rows.context.documents
    own_BS = documents_BS[:, rows.positions[0]].long()
    count = len(own_BS)
    at_BS = own_BS + documents * torch.arange(count, device=own_BS.device)[:, None]
    learned_BS = torch.where(rows.learned, -token_losses_BS, 0).double()
    sums = learned_BS.new_zeros(count * documents).index_add(0, at_BS.flatten(), learned_BS.flatten())
    if mesh.groups.cp.size() > 1:
        sums = reduce_from_tensor_model_parallel_region(sums, group=mesh.groups.cp)
    return sums.view(count, documents)


def answer_tokens(batch: Any) -> torch.Tensor:
    """Number of learned tokens of each document of a `data.batch.Batch`, [B, D] int64 on the CPU."""
    counts_BD = torch.zeros(batch.ranks.shape, dtype=torch.int64)
    return counts_BD.scatter_add(1, batch.document_index.long(), batch.learned.long())


def pair_places(batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row, document of the better, of the worse answer), [N] each, of all pairs of different ranks in one context."""
    ranks_BD, groups_BD = batch.ranks, batch.groups
    present_BD = ranks_BD >= 0
    is_pair_BDD = (groups_BD[:, :, None] == groups_BD[:, None, :]) & (ranks_BD[:, :, None] < ranks_BD[:, None, :])
    row, better, worse = (is_pair_BDD & present_BD[:, :, None] & present_BD[:, None, :]).nonzero(as_tuple=True)
    return row, better, worse


def count_pairs(batch: Any) -> tuple[int, ...]:
    """(pairs, tokens of their chosen answers) of some rows, for `train.objective.step_counts`."""
    row, better, _ = pair_places(batch)
    return len(row), int(answer_tokens(batch)[row, better].sum())


def pairs_of(batch: Any, sums_BD: torch.Tensor) -> PairLogProbs:
    """The pairs of a batch with `reference`. sums_BD: as `answer_log_probs` gives them."""
    device = sums_BD.device
    row, better, worse = (places.to(device) for places in pair_places(batch))
    reference_BD, tokens_BD = batch.reference.to(device), answer_tokens(batch).to(device)
    chosen, rejected = (row, better), (row, worse)
    return PairLogProbs(
        sums_BD[chosen],
        sums_BD[rejected],
        reference_BD[chosen],
        reference_BD[rejected],
        tokens_BD[chosen],
        tokens_BD[rejected],
    )


def dpo_step(mesh: Mesh, config: DpoConfig) -> Callable[..., Any]:
    """The function that Megatron's schedules call for each microbatch of preferences: (output, loss function).

    Every context rank computes the whole loss, and its gradient for its own tokens; reports are divided by the number of context
    ranks, because they are summed over them. The divisors are means of the step's microbatches (`train.objective.step_counts`).
    """
    context_ranks = mesh.groups.cp.size()

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch = next(microbatches)
        rows = local_rows(batch, mesh, reset_at_documents=True)
        output = model(rows.tokens, rows.positions, None, labels=rows.labels, packed_seq_params=rows.context)

        def loss_of(token_losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sums_BD = answer_log_probs(token_losses_BS, rows, batch.ranks.shape[1], mesh=mesh)
            pairs, chosen_tokens = batch.per_microbatch()
            found = dpo_loss(pairs_of(batch, sums_BD), config, step_pairs=pairs, step_chosen_tokens=chosen_tokens)
            chosen_N, rejected_N = found.chosen_rewards, found.rejected_rewards
            right_N = (chosen_N > rejected_N).double() + 0.5 * (chosen_N == rejected_N)
            means = [each.sum() / pairs for each in (chosen_N, rejected_N, chosen_N - rejected_N, right_N)]
            report = torch.stack([found.loss.detach(), found.preference, found.sft, *means])
            return found.loss.float(), report.float() / context_ranks

        return output, loss_of

    return step


def log_prob_step(mesh: Mesh) -> Callable[..., Any]:
    """A forward step without loss. Its report: `answer_log_probs` of the microbatch."""

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch = next(microbatches)
        rows = local_rows(batch, mesh, reset_at_documents=True)
        output = model(rows.tokens, rows.positions, None, labels=rows.labels, packed_seq_params=rows.context)

        def report_of(token_losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sums_BD = answer_log_probs(token_losses_BS, rows, batch.ranks.shape[1], mesh=mesh)
            return token_losses_BS.new_zeros(()), sums_BD

        return output, report_of

    return step


def implicit_pairs_step(mesh: Mesh, config: DpoConfig) -> Callable[..., Any]:
    """A forward step without loss. Its report: the implicit rewards of the microbatch's pairs."""
    forward = log_prob_step(mesh)

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch = next(microbatches)
        output, sums_of = forward(iter([batch]), model)

        def report_of(token_losses_BS: torch.Tensor) -> tuple[torch.Tensor, RankedPairs]:
            zero, sums_BD = sums_of(token_losses_BS)
            better_N, worse_N = implicit_rewards(pairs_of(batch, sums_BD), config)
            return zero, RankedPairs(better_N, worse_N, torch.ones_like(better_N))

        return output, report_of

    return step
