"""The output head: of a reward model, the head itself; of a language model, its forward pass over a few tokens at a time, the
model without it, and which rows of it stand for tokens."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from train.model.context import RowContext


class ScalarHead(MegatronModule):
    """A number for each token, the product of its hidden state with a weight [1, hidden], in fp32.

    It takes the place of Megatron's output layer, so it has its signature and its name in checkpoints. The weight is the same
    on every tensor rank. Under sequence parallelism each rank has some of the tokens, so Megatron must add up its gradients.
    """

    def __init__(self, config: TransformerConfig, *, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(config=config)
        self.group = group
        self.sequence_parallel = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden_SBH: torch.Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """-> (values [whole sequence of the context rank, rows, 1], no bias). Collective over the tensor group."""
        values = F.linear(hidden_SBH.float(), self.weight.float())
        if self.sequence_parallel:
            # All tensor ranks compute the same loss, so each takes its own part of the gradient; a sum would count it twice.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.group)
        return values, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight as a tensor of which every tensor rank has a copy."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def token_rows(slice_size: int, padding: int, group: dist.ProcessGroup) -> int:
    """How many rows of this tensor rank's slice of the head stand for tokens: all but the padding, which is on the last rank.

    padding: `model.vocab_padding`; a rule keeps it smaller than a slice.
    """
    return slice_size - padding if group.rank() == group.size() - 1 else slice_size


def hidden_states(
    model: Any, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, *, context: RowContext | None
) -> torch.Tensor:
    """Hidden states after the final norm, [sequence of this rank, rows, hidden]; on other pipeline stages, the stage's output.

    model: an unwrapped chunk. Runs the collectives of its forward pass.
    """
    has_head = model.post_process
    model.post_process = False  # Megatron then returns the input of the head
    try:
        return model(tokens_BS, positions_BS, None, packed_seq_params=context)
    finally:
        model.post_process = has_head


def head_weight(model: Any) -> torch.Tensor:
    """The head's weight on this tensor rank, [vocabulary of this rank, hidden]; `model` is the chunk that has the head.

    If the parameter all-gather over data ranks overlaps with the forward pass, this waits until it is complete.
    """
    head = model.output_layer
    # Megatron's DDP waits for the all-gather in a forward pre-hook, so call the module with zero tokens.
    if head._forward_pre_hooks:
        splits_sequence, head.sequence_parallel = head.sequence_parallel, False
        weight = _weight(model)
        with torch.no_grad():
            head(weight.new_empty(0, 1, weight.shape[1]), weight=weight)
        head.sequence_parallel = splits_sequence
    return _weight(model)


def whole_sequence(model: Any, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """Hidden states of the whole sequence on every tensor rank, where sequence parallelism has cut it. For use without gradients.

    Collective over the tensor group.
    """
    if not model.config.sequence_parallel:
        return hidden_SBH
    return gather_from_sequence_parallel_region(hidden_SBH, group=model.pg_collection.tp)


def head_logits(model: Any, hidden_NH: torch.Tensor) -> torch.Tensor:
    """Logits of some tokens, [N, vocabulary of this tensor rank], by the head's own forward pass; before the soft cap.

    hidden_NH: states after the final norm, complete on every tensor rank. `model` is the chunk that has the head.
    """
    head = model.output_layer
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    splits_sequence, head.sequence_parallel = head.sequence_parallel, False  # these tokens are not cut over the ranks
    try:
        logits_NBV, _ = head(hidden_NH[:, None], weight=weight)
    finally:
        head.sequence_parallel = splits_sequence
    return logits_NBV[:, 0]


@torch.no_grad()
def likeliest_ids(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """The token with the largest logit, [...], from logits [..., vocabulary of this tensor rank] before or after the soft cap; of
    equal ones the smallest id. Collective over the tensor group."""
    group = model.pg_collection.tp
    slice_size = logits.shape[-1]
    best, ids = logits[..., : token_rows(slice_size, model.vocab_padding, group)].float().max(-1)
    if group.size() == 1:
        return ids
    found = [torch.empty_like(best) for _ in range(group.size())]
    dist.all_gather(found, best.contiguous(), group=group)
    winner = torch.stack(found).argmax(0)
    ids = torch.where(winner == group.rank(), ids + group.rank() * slice_size, 0)
    dist.all_reduce(ids, group=group)
    return ids


def _weight(model: Any) -> torch.Tensor:
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight
