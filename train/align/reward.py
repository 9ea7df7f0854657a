"""The reward objective: a scalar head learns from ranked answers which is better (Bradley-Terry).

    rows --model--> a number for each token --last token of each answer--> rewards --by context--> pairs --> loss

The reward of an answer is the head's output at the last token of the answer that is learned, its end-of-turn: there the model
has read all of it. The answers to one context are documents of one row, so no rank needs another rank's rows.
"""

import train.megatron  # noqa: F401  prepares Megatron before the imports below

# isort: split
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

from recipes.schema.align import RewardConfig
from train.align.losses.preference import RankedPairs, ranked_pairs, ranking_loss
from train.objective.next_token import local_rows
from train.parallel.mesh import Mesh

REWARD_PARTS = ("accuracy", "chosen_reward", "rejected_reward", "margin")
"""What is reported next to the loss: the share of pairs in the right order (equal rewards count half), mean rewards of the
better and of the worse answers, and their difference. Every context counts once."""


@dataclass(frozen=True)
class AnswerPlaces:
    """Where the A answers of some rows end, in the order of rows and documents; on the CPU, [A] int64 each."""

    row: torch.Tensor
    token: torch.Tensor
    """Index in the whole row of the last input that belongs to the answer."""
    context: torch.Tensor
    """Number of the context among those of these rows, from 0."""
    slot: torch.Tensor
    """Number of the answer among those of its context, from 0."""
    rank: torch.Tensor


def answer_places(batch: Any) -> AnswerPlaces:
    """The answers of a `data.batch.Batch` of preferences.

    `learned` and `document_index` are about labels: the token that label i predicts is input i + 1. If the row or the document
    ends there (an answer that was cut), the last input counts.
    """
    documents_BS = batch.document_index.long()
    ranks_BD, indices_S = batch.ranks, torch.arange(documents_BS.shape[1])
    indices_BS = indices_S.expand_as(documents_BS)
    nothing_BD = torch.full(ranks_BD.shape, -1)
    end_BD = nothing_BD.scatter_reduce(1, documents_BS, indices_BS, "amax")
    learned_BS = torch.where(batch.learned, indices_BS, -1)
    learned_BD = nothing_BD.scatter_reduce(1, documents_BS, learned_BS, "amax")
    row, document = (ranks_BD >= 0).nonzero(as_tuple=True)
    last = learned_BD[row, document]
    assert (last >= 0).all(), "an answer without a learned token"
    groups = torch.stack([row, batch.groups[row, document].long()], dim=1)
    _, context, counts = torch.unique_consecutive(groups, dim=0, return_inverse=True, return_counts=True)
    slot = torch.arange(len(row)) - (counts.cumsum(0) - counts)[context]
    token = torch.minimum(last + 1, end_BD[row, document])
    return AnswerPlaces(row, token, context, slot, ranks_BD[row, document].long())


def rewards_at(
    values_BS: torch.Tensor, row_A: torch.Tensor, token_A: torch.Tensor, positions_S: torch.Tensor, *, mesh: Mesh
) -> torch.Tensor:
    """Values at places of whole rows, [A], on every context rank. values_BS: of this context rank's tokens; positions_S: their
    indices in the row. Collective over the context group; its backward pass keeps each rank's own tokens."""
    group, device = mesh.groups.cp, values_BS.device
    if group.size() == 1:
        return values_BS[row_A.to(device), token_A.to(device)]
    local = torch.full((len(positions_S) * group.size(),), -1, device=device)
    local[positions_S] = torch.arange(len(positions_S), device=device)
    at_A = local[token_A.to(device)]
    own_A = torch.where(at_A >= 0, values_BS[row_A.to(device), at_A.clamp(min=0)], 0)
    return reduce_from_tensor_model_parallel_region(own_A.clone(), group=group)


def pairs_of(batch: Any, values_BS: torch.Tensor, positions_S: torch.Tensor, *, mesh: Mesh) -> RankedPairs:
    """The pairs of a batch of preferences with their rewards, on every context rank. Arguments as of `rewards_at`."""
    places, device = answer_places(batch), values_BS.device
    rewards_A = rewards_at(values_BS, places.row, places.token, positions_S, mesh=mesh)
    contexts, most = (int(x.max()) + 1 if len(x) else 0 for x in (places.context, places.slot))
    at = (places.context.to(device), places.slot.to(device))
    rewards_CK = rewards_A.new_zeros(contexts, most).index_put(at, rewards_A)
    ranks_CK = torch.full((contexts, most), -1, device=device).index_put(at, places.rank.to(device))
    return ranked_pairs(rewards_CK, ranks_CK)


def count_contexts(batch: Any) -> tuple[int, ...]:
    """(number of contexts,) of some rows of preferences, for `train.objective.step_counts`."""
    return (int((batch.groups.amax(dim=1) + 1).sum()),)


def reward_step(mesh: Mesh, config: RewardConfig) -> Callable[..., Any]:
    """The function that Megatron's schedules call for each microbatch of preferences: (output, loss function).

    Every context rank computes the whole loss, and its gradient for its own tokens; the parts are divided by the number of
    context ranks, because reports are summed over them. The divisor is the mean number of contexts of the step's microbatches
    (`train.objective.step_counts`).
    """
    context_ranks = mesh.groups.cp.size()

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch = next(microbatches)
        rows = local_rows(batch, mesh, reset_at_documents=True)
        output = model(rows.tokens, rows.positions, None, packed_seq_params=rows.context)

        def loss_of(values_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pairs = pairs_of(batch, values_BS, rows.positions[0], mesh=mesh)
            (contexts,) = batch.per_microbatch()
            loss = ranking_loss(pairs, step_contexts=contexts, center_weight=config.center_weight)
            report = torch.stack([loss.detach(), *(part / contexts for part in _parts(pairs))])
            return loss, report / context_ranks

        return output, loss_of

    return step


def _parts(pairs: RankedPairs) -> list[torch.Tensor]:
    """Sums over contexts of `REWARD_PARTS`."""
    better, worse, weight = pairs.better_N.detach(), pairs.worse_N.detach(), pairs.weight_N
    right = (better > worse).to(weight.dtype) + 0.5 * (better == worse)
    return [(weight * each).sum() for each in (right, better, worse, better - worse)]
