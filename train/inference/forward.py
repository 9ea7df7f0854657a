"""One forward pass over the next tokens of several texts, through the layers that training uses.

    [Read(row, tokens, before), ...] --pack--> one row [T, 1, hidden] --layers and pools--> hidden states --head--> logits

Embeddings, projections, norms and MLPs see one row of T tokens. Mamba-2 and attention layers also receive `Segments`, which
say where each text begins in the row and where its states are. No padding is added anywhere. Under tensor parallelism all
ranks call with the same reads; the logits are gathered, so they are the same on all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launch.plan.cost.inference import cache_sizes
from recipes.schema.model import ModelConfig
from train.inference.pools import Pools
from train.model.context import KeyPlaces, RowContext, Segments
from train.model.few_tokens import MOST, MOST_OF_A_TEXT, FewTokens


@dataclass(frozen=True)
class Read:
    """The next tokens of one text."""

    row: int
    """The text's row in the page tables and slot of its states."""
    tokens: Sequence[int]
    before: int
    """Tokens of the text that were read before."""
    is_trial: bool = False
    """Whether some of the tokens may be taken back: `settle` must follow."""


def pack(
    reads: Sequence[Read], pools: Pools, *, device: torch.device, is_stepwise: bool = False
) -> tuple[torch.Tensor, Segments]:
    """-> (tokens [1, T], the segments). Reads of one token come first. The pools must have pages for all new tokens."""
    lines, total = [], 0
    for read in reads:
        lines.append((total, len(read.tokens), read.before, read.row))
        total += len(read.tokens)
    assert [line[1] for line in lines] == sorted((line[1] for line in lines), key=lambda n: n > 1), (
        "one token comes first"
    )
    table = by_token = np.array(lines, np.int64)
    of_token = np.arange(total)
    if total > len(reads):
        of_token = np.repeat(np.arange(len(reads)), table[:, 1])
        by_token = table[of_token]
        by_token[:, 2] += np.arange(total) - by_token[:, 0]
        by_token[:, 0], by_token[:, 1] = np.arange(total), 1
    trial = np.array([read.is_trial for read in reads])
    has_trial = bool(trial.any())
    lines_T4 = torch.from_numpy(by_token)
    segments = Segments(
        table=torch.from_numpy(table),
        by_token=lines_T4,
        positions_T=lines_T4[:, 2].to(device),
        longest=max(before + tokens for _, tokens, before, _ in lines),
        keys={kind: KeyPlaces(pools.table(kind), group.page_tokens) for kind, group in pools.groups.items()},
        key_pools=pools.keys,
        mamba_pools=pools.states,
        trial_S=torch.from_numpy(trial.astype(np.int64)) if has_trial else None,
        trial_T=torch.from_numpy(np.flatnonzero(trial[of_token])).to(device) if has_trial else None,
        is_stepwise=is_stepwise,
    )
    return torch.tensor([[id for read in reads for id in read.tokens]], device=device), segments


def read_tokens(
    model: Any, reads: Sequence[Read], pools: Pools, *, few: FewTokens | None = None, is_stepwise: bool = False
) -> torch.Tensor:
    """Read tokens into the pools. -> hidden states after the final norm, [T, hidden], in the order of the reads.

    few: the same layers, prepared for steps with few tokens; None: always call the layers. is_stepwise: `Segments.is_stepwise`.

    model: the whole model, or this tensor rank's part, in eval mode. Collective over the tensor group. The caller holds
    `torch.no_grad()`.
    """
    tokens_1T, segments = pack(reads, pools, device=pools.device, is_stepwise=is_stepwise)
    hidden = model.embedding(input_ids=tokens_1T, position_ids=segments.positions_T[None])
    is_cut_freely = is_stepwise or max(len(read.tokens) for read in reads) <= MOST_OF_A_TEXT
    if few is not None and len(hidden) <= MOST and is_cut_freely:
        return few(hidden[:, 0].contiguous(), segments)
    context = RowContext(segments=segments)
    for layer in model.decoder.layers:
        hidden = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=context)
        if isinstance(hidden, tuple):
            hidden = hidden[0]
    return model.decoder.final_norm(hidden)[:, 0]


@torch.no_grad()
def settle(model: Any, reads: Sequence[Read], accepted: Sequence[int], pools: Pools) -> None:
    """After `read_tokens` with trials: bring the states of their texts to where the first `accepted` tokens of each have been
    read, at least one of each. `reads`: those of that step which are trials, in order; states of other texts do not change.

    Mamba-2 layers repeat their scan over the inputs that they stored: no weight is read but those of the convolution.
    """
    if not pools.states:
        return
    begins = np.concatenate([[0], np.cumsum([len(read.tokens) for read in reads])])
    lines = [
        (int(begin), count, read.before, read.row)
        for read, count, begin in zip(reads, accepted, begins[:-1], strict=True)
    ]
    no_tokens = torch.empty(0, dtype=torch.int64)
    segments = Segments(
        table=torch.tensor(lines), by_token=no_tokens, positions_T=no_tokens, longest=0, keys={}, key_pools={},
        mamba_pools=pools.states,
    )  # fmt: skip
    for layer in model.decoder.layers:
        if (number := layer.layer_number) in pools.states:
            layer.mixer.continued(pools.states[number].inputs[: begins[-1]], segments)


def logits_of(model: Any, hidden_NH: torch.Tensor, *, few: FewTokens | None = None) -> torch.Tensor:
    """The head's logits for some hidden states, soft-capped if the model has a cap, fp32 [N, whole vocabulary].

    Collective over the tensor group.
    """
    part = few.logits(hidden_NH) if few is not None else None
    if part is None:
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        part, _ = model.output_layer(hidden_NH[:, None], weight=weight)
        part = model.capped(part[:, 0].float())
    group = model.pg_collection.tp
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def logits_in_parts(
    model: Any, tokens: Sequence[int], cuts: Sequence[int], *, shape: ModelConfig, page_tokens: int = 16
) -> torch.Tensor:
    """Logits after every token of one text, fp32 [tokens, vocabulary], read in parts of the given sizes, as in generation."""
    weight = next(model.parameters())
    sizes = cache_sizes(
        shape, rows=1, context_tokens=len(tokens), page_tokens=page_tokens, step_tokens=max(cuts),
        number_bytes=weight.element_size(),
    )  # fmt: skip
    pools = Pools(shape, sizes, dtype=weight.dtype, device=weight.device)
    parts, start = [], 0
    for count in cuts:
        end = start + count
        pools.extend(0, end)
        parts.append(logits_of(model, read_tokens(model, [Read(0, tokens[start:end], start)], pools)))
        pools.slide(0, end)
        start = end
    return torch.cat(parts)
