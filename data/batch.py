"""What the trainer gets: rows of tokens with their labels.

torch takes seconds to import. `stratum inspect` and `stratum trace` make no batches, so it is imported where tensors are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MediaBatch:
    """The media of some rows, each kind one after the other without padding, in the order of rows and slots."""

    patches: torch.Tensor
    """[patches of all images, patch x patch x 3] uint8, an image's row by row. A frame of a video is an image."""
    grids: torch.Tensor
    """[images, 2] int64: rows and columns of patches."""
    image_rows: torch.Tensor
    """[images] int64: the row of the batch that shows it."""
    image_slots: torch.Tensor
    """[images] int64: index in `tokens` of its first placeholder. Those of its other patches follow."""
    mels: torch.Tensor
    """[frames of all clips, mels] float32: log-mel frames of 10 ms."""
    clip_frames: torch.Tensor
    """[clips] int64"""
    clip_rows: torch.Tensor
    """[clips] int64: the row of the batch that plays it."""
    clip_slots: torch.Tensor
    """[clips] int64: index in `tokens` of its first placeholder. `data.media.audio_stride` frames have one."""

    def select(self, rows: Sequence[int]) -> MediaBatch:
        """The media of some rows, in the given order. A row may occur twice."""
        import torch  # takes seconds: see above

        patches = self.patches.split((self.grids[:, 0] * self.grids[:, 1]).tolist())
        mels = self.mels.split(self.clip_frames.tolist())
        images = [(new, int(at)) for new, old in enumerate(rows) for at in (self.image_rows == old).nonzero()]
        clips = [(new, int(at)) for new, old in enumerate(rows) for at in (self.clip_rows == old).nonzero()]
        image_at = torch.tensor([at for _, at in images], dtype=torch.int64)
        clip_at = torch.tensor([at for _, at in clips], dtype=torch.int64)
        return MediaBatch(
            patches=torch.cat([self.patches[:0], *(patches[at] for _, at in images)]),
            grids=self.grids[image_at],
            image_rows=torch.tensor([new for new, _ in images], dtype=torch.int64),
            image_slots=self.image_slots[image_at],
            mels=torch.cat([self.mels[:0], *(mels[at] for _, at in clips)]),
            clip_frames=self.clip_frames[clip_at],
            clip_rows=torch.tensor([new for new, _ in clips], dtype=torch.int64),
            clip_slots=self.clip_slots[clip_at],
        )

    def pinned(self) -> MediaBatch:
        """A copy in page-locked memory."""
        return MediaBatch(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})


@dataclass(frozen=True)
class Batch:
    """Some rows. All tensors are on the CPU."""

    tokens: torch.Tensor
    """[rows, row_tokens] int64; may share its memory with `labels`."""
    labels: torch.Tensor
    """[rows, row_tokens] int64: the token after each of `tokens`."""
    document_index: torch.Tensor | None
    """[rows, row_tokens] int32: index, in its row, of the document that each label belongs to, increasing from 0. (The input
    for a document's first token is an end-of-document token, which counts as part of it.) None if documents are not separated."""
    source: torch.Tensor
    """[rows] int32: index of the source in the recipe's order."""
    positions: np.ndarray
    """[rows] int64: index in the global row order. For held-out rows, the index among the source's held-out rows."""
    learned: torch.Tensor | None = None
    """[rows, row_tokens] bool: the labels that are learned, of chats what the assistant wrote, of preferences the ranked answers.
    None: all."""
    ranks: torch.Tensor | None = None
    """[rows, most documents] int16: the rank of each document of a row, an answer of a preference. 0 is the best, equal ranks
    are equally good, -1: the row has no such document. The second index is a document's `document_index`. What fills a row up
    has the index of its last answer and is not learned. None if the data has no preferences."""
    groups: torch.Tensor | None = None
    """[rows, most documents] int32: index, in its row, of the preference that each document belongs to, increasing from 0; -1:
    no such document. All answers of a preference are in one row, best first."""
    media: MediaBatch | None = None
    """Images and audio of the rows. None if the data has no sources of media."""
    reference: torch.Tensor | None = None
    """[rows, most documents] float64: log-probability of each answer under the reference of DPO, set by the trainer."""
    per_microbatch: Callable[[], tuple[float, ...]] | None = None
    """Mean numbers, over the microbatches of a step on all ranks, of what the objective counts, such as learned labels. Set by
    the trainer if it counts anything. It may wait for the other ranks."""

    def select(self, rows: np.ndarray) -> Batch:
        """A copy of some of the rows, in the given order. A row may occur twice."""
        import torch  # takes seconds: see above

        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return Batch(
            tokens=self.tokens[index],
            labels=self.labels[index],
            document_index=None if self.document_index is None else self.document_index[index],
            source=self.source[index],
            positions=self.positions[rows],
            learned=None if self.learned is None else self.learned[index],
            ranks=None if self.ranks is None else self.ranks[index],
            groups=None if self.groups is None else self.groups[index],
            media=None if self.media is None else self.media.select(index.tolist()),
            reference=None if self.reference is None else self.reference[index],
            per_microbatch=self.per_microbatch,
        )

    def part(self, start: int, stop: int) -> Batch:
        """Rows start to stop, as views of the same memory, except media."""
        return Batch(
            tokens=self.tokens[start:stop],
            labels=self.labels[start:stop],
            document_index=None if self.document_index is None else self.document_index[start:stop],
            source=self.source[start:stop],
            positions=self.positions[start:stop],
            learned=None if self.learned is None else self.learned[start:stop],
            ranks=None if self.ranks is None else self.ranks[start:stop],
            groups=None if self.groups is None else self.groups[start:stop],
            media=None if self.media is None else self.media.select(range(start, stop)),
            reference=None if self.reference is None else self.reference[start:stop],
            per_microbatch=self.per_microbatch,
        )

    def pinned(self) -> Batch:
        """A copy in page-locked memory, from which a GPU can copy asynchronously."""
        return Batch(
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            document_index=None if self.document_index is None else self.document_index.pin_memory(),
            source=self.source,
            positions=self.positions,
            learned=None if self.learned is None else self.learned.pin_memory(),
            ranks=None if self.ranks is None else self.ranks.pin_memory(),
            groups=None if self.groups is None else self.groups.pin_memory(),
            media=None if self.media is None else self.media.pinned(),
            reference=None if self.reference is None else self.reference.pin_memory(),
            per_microbatch=self.per_microbatch,
        )
