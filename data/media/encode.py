"""A record of media as token ids, each learned or not, with its items: what is written to a shard.

    parts --text: tokenizer, media: decoded for its size--> ids with runs of placeholders, mask, items, original bytes

    "A " [image of 2 x 3 patches] " sits."    ->    A <|image|> x 6 sits. <eod>
    [video, 2 frames]                         ->    <0.0 seconds> <|image|> x 4 <1.0 seconds> <|image|> x 4 <eod>

The record's text is learned, and the end-of-document token. Placeholders and the times of video frames are not: they are given.
(Times as text: Qwen3-VL, arXiv 2511.21631.) Every medium is decoded once here, so that a broken one is found before training.
"""

import base64
import json
from dataclasses import dataclass

import numpy as np

from data.chat.pack import MarkedDocument
from data.media.audio import frames_of, open_audio
from data.media.images import grid_of, open_image
from data.media.items import AUDIO, FRAME, IMAGE, Item
from data.media.video import frame_times, frames_at
from data.tokenizer import Tokenizer, Unencodable
from recipes.schema.data import MediaConfig
from recipes.schema.errors import DataError


class MediaTooLong(ValueError):
    """A record that is longer than a row."""


@dataclass(frozen=True)
class MediaDocument(MarkedDocument):
    """One record, as it is stored: it ends with the end-of-document token."""

    items: tuple[Item, ...] = ()
    """In the order of their slots; `file` counts in `files`."""
    files: tuple[bytes, ...] = ()
    """Original bytes of its media."""


@dataclass
class _Row:
    """A document while it is made."""

    ids: list[np.ndarray]
    learned: list[np.ndarray]
    items: list[Item]
    files: list[bytes]
    tokens: int = 0

    def add(self, ids: np.ndarray, *, learned: bool) -> None:
        self.ids.append(ids)
        self.learned.append(np.full(len(ids), learned))
        self.tokens += len(ids)


class MediaEncoder:
    """Encodes the records of one job."""

    def __init__(self, config: MediaConfig, tokenizer: Tokenizer, *, row_tokens: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._row_tokens = row_tokens
        self.long_records = 0
        """Records left out because they are longer than a row."""

    def document(self, text: str) -> MediaDocument | None:
        """The document of a record (`data.media.record`). None if it is left out because of its length.

        Raises ValueError for a record that cannot be used, MediaTooLong for one that is longer than a row if that is refused,
        DataError for a tokenizer without the placeholders.
        """
        row = _Row([], [], [], [])
        if self._tokenizer.bod is not None:
            row.add(np.array([self._tokenizer.bod]), learned=True)
        text_bytes = 0
        for number, part in enumerate(json.loads(text)["parts"], start=1):
            if part["type"] == "text":
                text_bytes += len(part["text"].encode())
                row.add(self._text(part["text"]), learned=True)
                continue
            content = base64.b64decode(part["data"])
            try:
                self._add(row, part["type"], content)
            except ValueError as error:
                raise ValueError(f"has a part {number} ({part['type']}) that {error}") from error
            row.files.append(content)
        row.add(np.array([self._tokenizer.eod]), learned=True)
        if row.tokens > self._row_tokens:
            if self._config.long_record == "drop":
                self.long_records += 1
                return None
            raise MediaTooLong(
                f"has {row.tokens:,} tokens, more than a row of data.row_tokens={self._row_tokens:,}. Use longer rows or fewer "
                f"positions (data.media.image_patches, video_patches, video_frames, audio_stride), or set "
                f"data.media.long_record=drop to leave it out and count it."
            )
        ids, learned = np.concatenate(row.ids), np.concatenate(row.learned)
        return MediaDocument(ids, learned, text_bytes, items=tuple(row.items), files=tuple(row.files))

    def _add(self, row: _Row, kind: str, content: bytes) -> None:
        """Append a medium. ValueError says why it cannot be used, as the rest of a sentence about it."""
        match kind:
            case "image":
                self._add_picture(row, IMAGE, open_image(content, most_pixels=self._config.most_pixels).size)
            case "audio":
                samples = open_audio(content, most_seconds=self._config.audio_seconds)
                frames = frames_of(len(samples))
                tokens = -(-frames // self._config.audio_stride)
                row.items.append(Item(AUDIO, row.tokens, tokens, frames, self._config.mels, len(row.files)))
                row.add(self._placeholders("audio_token", tokens), learned=False)
            case _:
                seconds, pixels = self._config.video_seconds, self._config.most_pixels
                per_second, most = self._config.frames_per_second, self._config.video_frames
                times = frame_times(content, per_second=per_second, most=most, most_seconds=seconds, most_pixels=pixels)
                pictures = frames_at(content, times, most_seconds=seconds, most_pixels=pixels)
                for time, frame in zip(times, pictures, strict=True):
                    row.add(self._text(f"<{time:.1f} seconds>"), learned=False)
                    self._add_picture(row, FRAME, frame.size, microseconds=round(time * 1e6))

    def _add_picture(self, row: _Row, kind: int, size: tuple[int, int], *, microseconds: int = 0) -> None:
        most = self._config.image_patches if kind == IMAGE else self._config.video_patches
        rows, columns = grid_of(*size, patch=self._config.patch, most_patches=most)
        row.items.append(Item(kind, row.tokens, rows * columns, rows, columns, len(row.files), microseconds))
        row.add(self._placeholders("image_token", rows * columns), learned=False)

    def _placeholders(self, field: str, count: int) -> np.ndarray:
        name = getattr(self._config, field)
        found = self._tokenizer.special.get(name)
        if found is None:
            raise DataError(
                f"the tokenizer has no special token {name!r} (data.media.{field}), which holds the place of media. Name it in "
                f"data.tokenizer.special_tokens for a trained tokenizer, or set the field to a special token of this one."
            )
        return np.full(count, found, dtype=np.int64)

    def _text(self, text: str) -> np.ndarray:
        if not text:
            return np.empty(0, dtype=np.int64)
        try:
            (ids,) = self._tokenizer.encode_batch([text])
        except Unencodable as error:
            raise ValueError(str(error)) from error
        if (lost := self._tokenizer.loss(text, ids)) is not None:
            raise ValueError(lost)
        return ids.astype(np.int64)
