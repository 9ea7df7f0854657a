"""Computes log-probabilities of tokens after a context, with the forward pass of training.

    requests --pack--> rows, one document per request --model up to its head--> hidden states
             --head, only at scored positions, in parts--> log p and argmax --sum over the world--> one Score per request

If the model separates documents, many requests share a row; otherwise each request has a separate row. The packing depends
only on the requests and the row length, so batch size and number of ranks change a score by rounding only. A request is the
sequence context + target. The model reads all of it except the last token, and its last len(target) positions predict the target:
each token is scored once, by a position that has not read it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipes.schema.errors import DataError
from train.engine import Engine, run_schedule
from train.evaluate.deal import deal, evaluating
from train.model.cross_entropy import vocab_parallel_cross_entropy
from train.model.head import head_logits, hidden_states, whole_sequence
from train.objective.next_token import local_rows
from train.parallel.mesh import Mesh

_OPEN_ROWS = 64
"""Number of rows that packing keeps open. More rows pack hardly better and cost more time."""
_HEAD_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Number of logits computed at once: scored tokens times vocabulary."""


@dataclass(frozen=True)
class Request:
    """What to score: `target` after `context`. Neither may be empty: the first token of a sequence has no prediction."""

    context: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The result for one request."""

    log_probability: float
    """Natural logarithm of the target's probability, summed over its tokens."""
    is_greedy: bool
    """Whether each token of the target is the most likely one after the tokens before it."""


@dataclass(frozen=True)
class Forward:
    """A model that scores rows, on one rank or many."""

    mesh: Mesh
    chunks: Sequence[Any]
    row_tokens: int
    """Length of the longest row."""
    microbatch_rows: int
    keeps_documents_apart: bool
    """Whether several requests may share a row."""
    run: Callable[[Iterable["PackedRows"], Callable[..., Any]], list[torch.Tensor]]
    """Runs this rank's microbatches through a forward step. -> the reports, on the last pipeline stage."""
    has_fixed_shape: bool
    """Whether each microbatch must have exactly [microbatch_rows, row_tokens], as pipelines need it."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of requests. The model reads the same fields as of a `data.batch.Batch`."""

    tokens: torch.Tensor
    """[rows, length] int64."""
    labels: torch.Tensor
    """[rows, length] int64: the next token if it is scored, else -1."""
    document_index: torch.Tensor
    """[rows, length] int32: index within the row of the request that each token belongs to."""
    owner: torch.Tensor
    """[rows, length] int64: number of the request over all rows; undefined where the label is -1."""
    learned: None = None
    """As in a `Batch`; always None, because `labels` say which tokens are scored."""
    media: None = None
    """As in a `Batch`; requests are text."""


def forward_of_engine(engine: Engine) -> Forward:
    """Scoring with the model that is being trained, at any layout. Calls of `scores` are then collective over the world."""
    return Forward(
        mesh=engine.mesh,
        chunks=engine.chunks,
        row_tokens=engine.row_tokens,
        microbatch_rows=engine.microbatch_rows,
        keeps_documents_apart=engine.reset_at_documents,
        run=lambda rows, step: run_schedule(engine, list(rows), forward_step=step, forward_only=True),
        has_fixed_shape=True,
    )


def forward_of_model(model: Any, *, row_tokens: int, microbatch_rows: int, mesh: Mesh) -> Forward:
    """Scoring with a model for inference (`train.build.model_on_ranks`), whose layers separate documents."""

    def run(rows: Iterable[PackedRows], step: Callable[..., Any]) -> list[torch.Tensor]:
        reports = []
        for batch in rows:
            output, report_of = step(iter([batch]), model)
            reports.append(report_of(output)[1])
        return reports

    return Forward(
        mesh=mesh,
        chunks=[model],
        row_tokens=row_tokens,
        microbatch_rows=microbatch_rows,
        keeps_documents_apart=True,
        run=run,
        has_fixed_shape=False,
    )


def scores(forward: Forward, requests: Sequence[Request]) -> list[Score]:
    """The score of each request, the same on every rank. Collective over the world.

    Raises DataError for a request that does not fit into a row; `rolling_requests` and `fitted` cut texts to fit.
    """
    if not requests:
        return []
    mesh, layout = forward.mesh, forward.mesh.layout
    rows = pack(requests, row_tokens=forward.row_tokens, is_shared=forward.keeps_documents_apart)
    mine = deal(len(rows), mesh, microbatch_rows=forward.microbatch_rows, is_padded=forward.has_fixed_shape)
    with evaluating(forward.chunks):
        length = forward.row_tokens if forward.has_fixed_shape else None
        batches = (packed_rows([rows[i] if counts else [] for i, counts in part], requests, length) for part in mine)
        reports = forward.run(batches, _step(forward))
    total = torch.zeros(len(requests), 2, dtype=torch.float64, device=mesh.device)
    for owner, nats, misses in reports:
        total.index_add_(0, owner.long(), torch.stack([nats, misses], dim=1))
    # Context ranks have different tokens of a request, data ranks have different requests, tensor ranks have the same tokens.
    total = (mesh.sum_over_world(total) / layout.tensor).cpu()
    return [Score(-float(nats), bool(misses == 0)) for nats, misses in total.tolist()]


def pack(requests: Sequence[Request], *, row_tokens: int, is_shared: bool) -> list[list[int]]:
    """Numbers of the requests in each row: longest first, each into the first open row with enough room."""
    sizes = [_inputs(request) for request in requests]
    for request, size in zip(requests, sizes, strict=True):
        assert request.context and request.target, "a request needs a context and a target"
        if size > row_tokens:
            raise DataError(
                f"a text of {len(request.context):,} + {len(request.target):,} tokens does not fit into a row of "
                f"{row_tokens:,}. Shorten it, or allow longer rows (--row-tokens)."
            )
    return first_fit(sizes, row_tokens=row_tokens, is_shared=is_shared)


def first_fit(sizes: Sequence[int], *, row_tokens: int, is_shared: bool = True) -> list[list[int]]:
    """Numbers of the texts of these sizes in each row: longest first, each into the first open row with enough room.

    is_shared: whether a row may have several texts.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        first = max(0, len(rows) - _OPEN_ROWS) if is_shared else len(rows)
        place = next((row for row in range(first, len(rows)) if room[row] >= sizes[index]), None)
        if place is None:
            rows.append([])
            room.append(row_tokens)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= sizes[index]
    return rows


def fitted(request: Request, row_tokens: int) -> Request:
    """The request, with its context cut at the beginning if it does not fit into a row; at least one token of it stays."""
    excess = _inputs(request) - row_tokens
    return request if excess <= 0 else Request(request.context[min(excess, len(request.context) - 1) :], request.target)


def rolling_requests(tokens: Sequence[int], *, prefix: int, row_tokens: int) -> Iterator[Request]:
    """A whole text as requests that score each of its tokens once. The first token follows `prefix` (begin-of-document); the
    last window has as much context as fits into a row. The windows equal those of lm-evaluation-harness for a context of 1
    (`lm_eval.utils.get_rolling_token_windows`)."""
    first = tuple(tokens[:row_tokens])
    if first:
        yield Request((prefix,), first)
    for done in range(row_tokens, len(tokens), row_tokens):
        end = min(done + row_tokens, len(tokens))
        yield Request(tuple(tokens[end - row_tokens - 1 : done]), tuple(tokens[done:end]))


def bits(log_probability: float) -> float:
    """A log-probability in nats as bits of information."""
    return -log_probability / math.log(2)


def _inputs(request: Request) -> int:
    """Number of tokens that the model reads: all except the last."""
    return len(request.context) + len(request.target) - 1


def packed_rows(rows: list[list[int]], requests: Sequence[Request], length: int | None) -> PackedRows:
    """One microbatch, of rows of `length` tokens; None: of its longest row."""
    if length is None:
        length = max((sum(_inputs(requests[i]) for i in row) for row in rows), default=0)
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full_like(tokens, -1)
    documents = np.zeros(tokens.shape, dtype=np.int32)
    owner = np.zeros_like(tokens)
    for place, row in enumerate(rows):
        slot = 0
        for document, index in enumerate(row):
            request = requests[index]
            sequence = np.array(request.context + request.target, dtype=np.int64)
            stop = slot + len(sequence) - 1
            tokens[place, slot:stop] = sequence[:-1]
            labels[place, stop - len(request.target) : stop] = request.target
            documents[place, slot:stop] = document
            owner[place, slot:stop] = index
            slot = stop
        documents[place, slot:] = len(row)  # the filling of the row is a separate document
    return PackedRows(*map(torch.from_numpy, (tokens, labels, documents, owner)))


def _step(forward: Forward) -> Callable[..., Any]:
    """The function that Megatron's schedules call for a microbatch. Its report: [3, scored tokens of this rank] float64 of
    request number, nats, and whether another token was likelier."""
    mesh = forward.mesh

    def step(microbatches: Any, model: torch.nn.Module) -> Any:
        batch: PackedRows = next(microbatches)
        chunk: Any = getattr(model, "module", model)
        rows = local_rows(batch, mesh, reset_at_documents=forward.keeps_documents_apart)
        hidden = hidden_states(chunk, rows.tokens, rows.positions, context=rows.context)
        owner_BS = batch.owner.to(mesh.device)[:, rows.positions[0]]

        def report_of(hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_SBH = whole_sequence(chunk, hidden_SBH)
            is_scored = rows.labels >= 0
            picked_NH = hidden_SBH.transpose(0, 1)[is_scored]
            nats, misses = _token_scores(chunk, picked_NH, rows.labels[is_scored], group=mesh.groups.tp)
            return hidden_SBH.new_zeros(()), torch.stack([owner_BS[is_scored].double(), nats, misses])

        return hidden, report_of

    return step


def _token_scores(
    chunk: Any, hidden_NH: torch.Tensor, labels_N: torch.Tensor, *, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats of each label, 1 if another token is likelier), float64 [N]. Collective over the tensor group."""
    nats = torch.empty(len(labels_N), dtype=torch.float64, device=hidden_NH.device)
    misses = torch.empty_like(nats)
    # All ranks have slices of the vocabulary of the same length, so they compute the same number of parts.
    vocabulary = int(head_logits(chunk, hidden_NH[:0]).shape[-1])
    size = max(1, _HEAD_LOGITS.get(hidden_NH.device.type, 1 << 26) // vocabulary)
    for start in range(0, len(labels_N), size):
        part = slice(start, start + size)
        logits_NV = head_logits(chunk, hidden_NH[part])
        best = _argmax_over_ranks(chunk.capped(logits_NV), group=group)
        losses = vocab_parallel_cross_entropy(
            logits_NV[:, None], labels_N[part, None], group=group, softcap=chunk.logit_softcap,
            padding=chunk.vocab_padding,
        )  # fmt: skip
        nats[part], misses[part] = losses[:, 0].double(), (best != labels_N[part]).double()
    return nats, misses


def _argmax_over_ranks(logits_NV: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    """Id of the largest logit of each line in the whole vocabulary; among equal ones, the first. A soft cap keeps the order."""
    value, index = logits_NV.float().max(dim=-1)
    index = index + group.rank() * logits_NV.shape[-1]
    if group.size() > 1:
        largest = value.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        index = torch.where(value == largest, index, torch.iinfo(index.dtype).max)
        dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    return index
