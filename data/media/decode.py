"""From items and original bytes to what encoders read: patches of images and frames, log-mel frames of audio.

    [(item, bytes)] --decoded--> Decoded(patches uint8, mels float32), for each item, in order

Sizes are those of the items, decided when the data was prepared; nothing is decided here.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.media.audio import log_mel, open_audio
from data.media.images import open_image, patches_of
from data.media.items import AUDIO, FRAME, Item
from data.media.video import frames_at
from recipes.schema.data import MediaConfig


@dataclass(frozen=True)
class Decoded:
    """One item, decoded."""

    item: Item
    values: np.ndarray
    """uint8 [rows x columns, patch x patch x 3] of an image or frame; float32 [frames, mels] of audio."""


def decoded(files: Sequence[tuple[Item, bytes]], config: MediaConfig) -> Iterator[Decoded]:
    """The items of one document. ValueError says what is wrong with one, as the rest of a sentence about it.

    The frames of a video are decoded in one pass. One image or frame is in memory at its full size at a time.
    """
    for (kind, _), group in itertools.groupby(files, key=lambda pair: (pair[0].kind, pair[0].file)):
        items, contents = zip(*group, strict=True)
        if kind == FRAME:
            for video in _videos(items):
                yield from _frames(video, contents[0], config)
            continue
        for item in items:
            yield Decoded(item, _values(item, contents[0], config))


def _videos(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The frames of one showing each: a document may show the same video several times in a row."""
    video: list[Item] = []
    for item in items:
        if video and item.microseconds <= video[-1].microseconds:
            yield video
            video = []
        video.append(item)
    yield video


def _frames(items: Sequence[Item], content: bytes, config: MediaConfig) -> Iterator[Decoded]:
    times = [item.microseconds / 1e6 for item in items]
    frames = frames_at(content, times, most_seconds=config.video_seconds, most_pixels=config.most_pixels)
    for item, frame in zip(items, frames, strict=True):
        yield Decoded(item, patches_of(frame, (item.rows, item.columns), patch=config.patch))


def _values(item: Item, content: bytes, config: MediaConfig) -> np.ndarray:
    if item.kind != AUDIO:
        image = open_image(content, most_pixels=config.most_pixels)
        return patches_of(image, (item.rows, item.columns), patch=config.patch)
    found = log_mel(open_audio(content, most_seconds=config.audio_seconds), mels=item.columns)
    if len(found) != item.rows:
        raise ValueError(f"now has {len(found):,} frames of audio instead of {item.rows:,}")
    return found
