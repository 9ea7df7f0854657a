"""The distillation objective: match a teacher's distribution, token by token.

    rows --> teacher (distill.teacher) or its cached logits (distill.teacher_cache) --+
      |                                                                               +--> loss (distill.soft_targets)
      +----> student, up to its head -------------------------------------------------+

    loss = w_d divergence + w_n next-token + a hidden match        mean over the tokens (of chats: learned labels) of a step

Forward KL on logits alone, temperature 1, is what Minitron found best (arXiv 2407.14679, section 4.3) and Nemotron Nano 2
used (arXiv 2508.14444, section 4). Gemma 2 replaces the label by the teacher's whole distribution (arXiv 2408.00118,
section 3.3). With Minitron's balance, a = divergence / match of the same row, so it does not depend on which rank gets
which row. The loss is computed on the student's last pipeline stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from recipes.schema.objective import ObjectiveConfig
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_rules import hidden_pairs, kept_channels
from train.checkpoint.manager import checkpoint_at
from train.distill.soft_targets import CachedTargets, Head, LossWeights, OnlineTargets, Targets, TopK, head_losses
from train.distill.teacher import LayerOutputs, Teacher
from train.distill.teacher_cache import TeacherCache
from train.model.attention import zigzag_positions
from train.model.head import head_weight, hidden_states
from train.objective.next_token import LocalRows, local_rows
from train.parallel.mesh import Mesh

PARTS = ("divergence", "next_token", "hidden")
"""Names of the parts of the loss, as they are reported next to the total."""


@dataclass(frozen=True)
class HiddenMatch:
    """Which hidden states of student and teacher are compared, and how."""

    kind: str
    final: bool
    """Compare the states after the final norms."""
    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    weight: float | None
    """None: each row is weighted so that the match counts as much as the divergence (Minitron's balance)."""
    channels: torch.Tensor | None
    """Teacher channels that a pruned student kept; None: all."""


def distill_step(
    recipe: Recipe, *, mesh: Mesh, source: "Teacher | TeacherCache | None", match: HiddenMatch | None
) -> Callable[..., Any]:
    """The function that Megatron's schedules call for each microbatch. source: None on ranks of earlier stages.

    For each microbatch it reports [loss, *PARTS], scaled like the loss of the next-token objective
    (`next_token.forward_step`).
    """
    objective, model_config = recipe.objective, recipe.model
    weights = LossWeights(
        divergence=objective.distill_weight,
        next_token=objective.next_token_weight,
        temperature=objective.temperature,
        is_cross_entropy=objective.divergence == "cross_entropy",
    )
    context_ranks = mesh.groups.cp.size()

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch = next(microbatches)
        chunk: Any = getattr(model, "module", model)
        rows = local_rows(batch, mesh, reset_at_documents=recipe.data.reset_at_documents)
        if not chunk.post_process or source is None:
            return hidden_states(chunk, rows.tokens, rows.positions, context=rows.context), None
        chosen_N = None if rows.learned is None else rows.learned.t().reshape(-1).nonzero().squeeze(1)
        targets, teacher_layers = _targets(source, batch, rows, chosen_N, mesh=mesh, objective=objective, match=match)
        with LayerOutputs(chunk, match.student_layers if match else ()) as outputs:
            final = hidden_states(chunk, rows.tokens, rows.positions, context=rows.context)

        def loss_of(hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sequence, count = rows.labels.shape[1], rows.labels.shape[0]
            hidden_NH, labels_N = (
                _whole_on_every_rank(hidden_SBH, chunk, mesh).flatten(0, 1),
                rows.labels.t().reshape(-1),
            )
            if chosen_N is not None:
                hidden_NH, labels_N = hidden_NH[chosen_N], labels_N[chosen_N]
            losses = head_losses(
                hidden_NH,
                Head.of(head_weight(chunk), model_config, group=mesh.groups.tp),
                targets=targets,
                labels_N=labels_N,
                weights=weights,
                group=mesh.groups.tp,
                chunk_tokens=objective.chunk_tokens,
            )
            total = losses.total
            matched = torch.zeros((), device=total.device)
            if match is not None:
                states = [outputs.taken[layer] for layer in match.student_layers]
                pairs = list(zip([*([hidden_SBH] if match.final else []), *states], teacher_layers, strict=True))
                divergence_N = losses.divergence_N
                if chosen_N is not None:
                    divergence_N = divergence_N.new_zeros(sequence * count).index_copy(0, chosen_N, divergence_N)
                divergence_B = divergence_N.view(sequence, count).sum(0)
                extra, matched = _match(
                    pairs, match, divergence_B, rows.learned, mesh=mesh, splits_sequence=_splits(chunk)
                )
                total = total + extra
            scale = 1 / (sequence * count * context_ranks if rows.learned is None else batch.per_microbatch()[0])
            parts = [total, losses.divergence_N.sum(), losses.next_token_N.sum(), matched]
            return total * scale, torch.stack([part.detach().float() for part in parts]) * scale

        return final, loss_of

    return step


def _targets(
    source: Teacher | TeacherCache,
    batch: Any,
    rows: LocalRows,
    chosen_N: torch.Tensor | None,
    *,
    mesh: Mesh,
    objective: ObjectiveConfig,
    match: HiddenMatch | None,
) -> tuple[Targets, list[torch.Tensor]]:
    """The teacher's targets for the tokens of this context rank, and its hidden states to match. chosen_N: places of the learned
    tokens, sequence first; None: all are."""
    cp = mesh.groups.cp
    tokens = batch.tokens.to(mesh.device, non_blocking=True)
    # Teacher and cache see whole rows; the loss needs only the positions that zigzag gives to this context rank.
    local_positions = zigzag_positions(tokens.shape[1], rank=cp.rank(), ranks=cp.size(), device=mesh.device)
    if isinstance(source, TeacherCache):
        cached = source.read(batch, documents=rows.context is not None)

        def local(x: torch.Tensor) -> torch.Tensor:  # [rows, sequence, ...] of whole rows -> [tokens of this rank, ...]
            local_N = x.to(mesh.device)[:, local_positions].transpose(0, 1).flatten(0, 1)
            return local_N if chosen_N is None else local_N[chosen_N]

        return CachedTargets(TopK(local(cached.ids_NK).long(), local(cached.log_p_NK), local(cached.rest_N))), []
    documents = rows.context.documents if rows.context is not None else None
    states = source.hidden(tokens, documents, layers=match.teacher_layers if match else ())
    states = [state[local_positions] if cp.size() > 1 else state for state in states]
    final_NH = states[0].flatten(0, 1)
    final_NH = final_NH if chosen_N is None else final_NH[chosen_N]
    targets = OnlineTargets(final_NH, source.head, top_k=objective.top_k)
    return targets, states if match is not None and match.final else states[1:]


def _splits(chunk: Any) -> bool:
    """Whether tensor ranks split hidden states along the sequence (sequence parallelism)."""
    return bool(chunk.config.sequence_parallel)


def _whole_on_every_rank(hidden_SBH: torch.Tensor, chunk: Any, mesh: Mesh) -> torch.Tensor:
    """Hidden states of all tokens on every tensor rank, as the head needs them. Backward sums the ranks' gradients."""
    if _splits(chunk):
        return gather_from_sequence_parallel_region(hidden_SBH, group=mesh.groups.tp)
    return copy_to_tensor_model_parallel_region(hidden_SBH, group=mesh.groups.tp)


def _match(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    match: HiddenMatch,
    divergence_B: torch.Tensor,
    learned_BS: torch.Tensor | None,
    *,
    mesh: Mesh,
    splits_sequence: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted sum for the loss, plain sum) over learned tokens of each token's distance, averaged over the pairs.

    Under sequence parallelism a rank has only some of the tokens: the values returned cover all tokens, the gradients only
    its own.
    """
    distance_B = torch.zeros_like(divergence_B)
    learned_SB = None if learned_BS is None else learned_BS.t()
    if learned_SB is not None and splits_sequence:
        learned_SB = learned_SB.chunk(mesh.groups.tp.size())[mesh.groups.tp.rank()]
    for student, teacher in pairs:
        if splits_sequence:
            teacher = teacher.chunk(mesh.groups.tp.size())[mesh.groups.tp.rank()]
        if match.channels is not None:
            teacher = teacher[..., match.channels]
        distance_SB = _distance(student.float(), teacher.float(), match.kind)
        if learned_SB is not None:
            distance_SB = torch.where(learned_SB, distance_SB, 0)
        distance_B = distance_B + distance_SB.sum(0) / len(pairs)
    whole_B = distance_B.detach().clone()
    if splits_sequence:
        dist.all_reduce(whole_B, group=mesh.groups.tp)
    if match.weight is not None:
        alpha_B = torch.full_like(whole_B, match.weight)
    else:
        ratio = torch.stack([divergence_B, whole_B])
        if mesh.groups.cp.size() > 1:
            dist.all_reduce(ratio, group=mesh.groups.cp)
        alpha_B = ratio[0] / ratio[1].clamp_min(torch.finfo(ratio.dtype).tiny)
    weighted = (alpha_B * distance_B).sum()
    # The detached difference sets the value to the sum over all tokens and leaves the gradient of the local tokens.
    return weighted + ((alpha_B * whole_B).sum() - weighted).detach(), whole_B.sum()


def _distance(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """Per token, [sequence, rows]: 1 - cosine, or squared error divided by the teacher's squared norm."""
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def hidden_match(recipe: Recipe, teacher: Teacher | None) -> HiddenMatch | None:
    """The hidden-state match that `objective.hidden_*` configures; None without one. teacher: None on earlier stages."""
    objective = recipe.objective
    if objective.hidden_match == "none" or teacher is None:
        return None
    pairs = hidden_pairs(objective.hidden_layers)
    return HiddenMatch(
        kind=objective.hidden_match,
        final=pairs is None,
        student_layers=tuple(s for s, _ in pairs or []),
        teacher_layers=tuple(t for _, t in pairs or []),
        weight=objective.hidden_weight,
        channels=_kept_channels(recipe, teacher),
    )


def _kept_channels(recipe: Recipe, teacher: Teacher) -> torch.Tensor | None:
    """Residual channels of the teacher that a pruned student kept, from the lineage of its start checkpoint.

    None if both have the same width.
    """
    if recipe.model.hidden == teacher.model.hidden:
        return None
    assert recipe.run.start_from is not None, "teacher_rules.width_problems refuses this"
    kept = kept_channels(checkpoint_at(recipe.run.start_from)[1].lineage, of=teacher.model.hidden)
    return torch.tensor(kept, device=teacher.head.weight_VH.device)
