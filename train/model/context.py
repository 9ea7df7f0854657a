"""What every layer receives in addition to hidden states: document boundaries, or the texts and states of a step of inference.

Megatron passes `packed_seq_params` through the schedules, activation recomputation and every layer to the mixer and the
attention core. `RowContext` extends that class, so no second path is needed.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from data.batch import MediaBatch
from train.model.documents import document_starts

PAGE_TOKENS = 16
"""Tokens of a page of keys and values, unless an engine has another size. Attention sums page by page, so bits depend on it."""


@dataclass(frozen=True)
class KeyPool:
    """Pages of one attention layer: keys and values, each [pages, page tokens, kv heads, head width]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class MambaPool:
    """States of one Mamba-2 layer, at least fp32: the convolution's last inputs [slots, taps - 1, channels] and the scan's
    states [slots, heads, state, head width]."""

    conv: torch.Tensor
    scan: torch.Tensor
    inputs: torch.Tensor
    """[places, width of the in-projection]: the layer's inputs of a step's trial tokens, from place 0 on."""


@dataclass(frozen=True)
class KeyPlaces:
    """Where the attention layers of one kind (all with a window, or all without) keep the keys of the texts of a step."""

    table: torch.Tensor
    """[slots, pages of a text] int32: the page of the pools that has each page of the text. The pages that a text's next
    token does not see may be gone."""
    page_tokens: int

    def places(self, positions_T: torch.Tensor, slots_T: torch.Tensor) -> torch.Tensor:
        """Place (page x page tokens + token of the page) of each of some tokens, [T] int64."""
        pages_T = self.table[slots_T.to(self.table.device), positions_T // self.page_tokens].long()
        return pages_T * self.page_tokens + positions_T % self.page_tokens


@dataclass(frozen=True)
class DocumentPages:
    """The documents of packed rows as texts of a step of inference: where each token and its keys are."""

    lines_T4: torch.Tensor
    """[sequence x rows, 4] int64, in the order of tensors [sequence, rows, ...]: index, 1, tokens before, document."""
    table: torch.Tensor
    """[documents, pages of the longest] int32: pages of each document."""
    pages: int


def document_pages(documents_BL: torch.Tensor, *, page_tokens: int) -> DocumentPages:
    """Each document begins a page of its own."""
    rows, length = documents_BL.shape
    places = torch.arange(length)
    starts_BL = document_starts(documents_BL).long()
    numbers_BL = (starts_BL == places).flatten().cumsum(0).view(rows, length) - 1
    pages = -(-numbers_BL.flatten().bincount() // page_tokens)
    table = (pages.cumsum(0) - pages)[:, None] + torch.arange(int(pages.max()))
    columns = [torch.arange(rows * length), torch.ones(rows * length, dtype=torch.int64)]
    columns += [(places - starts_BL).t().flatten(), numbers_BL.t().flatten()]
    return DocumentPages(torch.stack(columns, dim=1), table.to(torch.int32), int(pages.sum()))


@dataclass(frozen=True)
class Segment:
    """The next tokens of one text, neighbours in the packed row of a step."""

    begin: int
    """Index of the first of them in the packed row."""
    tokens: int
    before: int
    """Tokens of the text that were read in earlier steps."""
    slot: int
    """Where the text's states are, and its line in the page tables."""
    is_trial: bool = False
    """Whether some of the tokens may be taken back: Mamba-2 layers leave the states as they are, and store their inputs."""


@dataclass(frozen=True)
class Segments:
    """A step of inference: tokens of several texts as one row [T, 1, hidden], each text continued from its states.

    Layers update the pools in place. Texts with one new token come first: they are computed together.
    """

    table: torch.Tensor
    """The segments as numbers, [segments, 4] int64: begin, tokens, before, slot."""
    by_token: torch.Tensor
    """The same with each token as a segment of its own, [T, 4]."""
    positions_T: torch.Tensor
    """[T] int64: position of each token in its text."""
    longest: int
    """Tokens of the longest text, the new ones included."""
    keys: dict[str, KeyPlaces]
    """By kind of attention layer, `*` or `w`."""
    key_pools: dict[int, KeyPool]
    """By layer number."""
    mamba_pools: dict[int, MambaPool]
    """By layer number."""
    trial_S: torch.Tensor | None = None
    """[segments] int64: 1 for a trial. None: there are none."""
    trial_T: torch.Tensor | None = None
    """Indices of the tokens of trials in the packed row, in order."""
    is_stepwise: bool = False
    """Compute token by token also where a text has many tokens: its bits then do not depend on how it was cut into steps."""

    @cached_property
    def segments(self) -> list[Segment]:
        """The segments as objects (layers whose kernels are compiled need the table only)."""
        trial = self.trial_S.tolist() if self.trial_S is not None else [0] * len(self.table)
        lines = zip(self.table.tolist(), trial, strict=True)
        return [
            Segment(begin, tokens, before, slot, bool(is_trial)) for (begin, tokens, before, slot), is_trial in lines
        ]

    @cached_property
    def singles(self) -> int:
        """How many segments, the first ones, have one token."""
        return int((self.table[:, 1] == 1).sum())


@dataclass
class RowContext(PackedSeqParams):
    """Extra inputs of one microbatch. Rows stay [sequence, rows, hidden] ("sbhd"); documents are given by index."""

    qkv_format: str = "sbhd"
    documents: torch.Tensor | None = None
    """[rows, sequence] int: document of each token of the whole row (also under context parallelism). None: one document."""
    segments: Segments | None = None
    """Set during inference only."""
    is_stepwise: bool = False
    """Compute token by token, as a model that generates does: compiled kernels then give the same bits (docs/align.md)."""
    media: MediaBatch | None = None
    """Images and clips of the rows, whose placeholders the first stage replaces by features (`train.model.media`)."""
    masks: dict[tuple[int | None, ...], Any] = field(default_factory=dict)
    """Attention masks that layers of this microbatch share (`train.model.flex`)."""

    @cached_property
    def document_pages(self) -> DocumentPages:
        """Of `documents`, on a CPU, in pages of an engine's default size."""
        assert self.documents is not None
        return document_pages(self.documents, page_tokens=PAGE_TOKENS)

    def without_media(self) -> "RowContext | None":
        """What the layers get; None if it is nothing."""
        if self.documents is None and self.segments is None and not self.is_stepwise:
            return None
        return replace(self, media=None)

    def __post_init__(self) -> None:
        """Megatron's stock mixer passes `seq_idx` to mamba-ssm's kernels, which reset the state where it changes."""
        super().__post_init__()
        if self.documents is not None:
            self.seq_idx = self.documents.to(torch.int32).contiguous()
