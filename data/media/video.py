"""Video: bytes -> some frames, chosen by time. The only module that imports PyAV.

    bytes --frame_times--> seconds [frames]        bytes, seconds --frames_at--> (second, Pillow image), in order

The container is recognised by its first bytes and named to FFmpeg, because its own detection also opens playlists, which name
other files. A frame is the last one that is shown at its time. Memory: one frame at a time. A bad video is a ValueError that says
why, as the rest of a sentence about it.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL.Image import Image

from data.media.images import from_pixels
from data.system.optional_package import optional_package

_EBML = b"\x1a\x45\xdf\xa3"
_MOST_FRAMES_PER_SECOND = 1000
"""A stream with more frames than this in each second is damaged or hostile."""


def frame_times(content: bytes, *, per_second: float, most: int, most_seconds: float, most_pixels: int) -> list[float]:
    """Seconds, from the first frame on, at which frames are read: every 1 / per_second; spread evenly if those are over `most`.

    Decodes the video once, so that a damaged one is found now. ValueError says why it cannot be used.
    """
    duration, count = 0.0, 0
    for second, _ in _decoded(content, most_seconds=most_seconds, most_pixels=most_pixels):
        duration, count = second, count + 1
    if not count:
        raise ValueError("has no frames")
    wanted = int(duration * per_second + 1e-6) + 1
    if wanted <= most:
        return [number / per_second for number in range(wanted)]
    return [duration * number / max(1, most - 1) for number in range(most)]


def frames_at(content: bytes, times: Sequence[float], *, most_seconds: float, most_pixels: int) -> Iterator[Image]:
    """The frames at ascending times, as `frame_times` gives them."""
    left = list(times)
    shown: Any = None
    for second, frame in _decoded(content, most_seconds=most_seconds, most_pixels=most_pixels):
        while left and shown is not None and second > left[0] + 1e-6:
            yield _as_image(shown)
            left.pop(0)
        if not left:
            return
        shown = frame
    for _ in left:
        yield _as_image(shown)


def _as_image(frame: Any) -> Image:
    return from_pixels(np.ascontiguousarray(frame.to_ndarray(format="rgb24")))


def _decoded(content: bytes, *, most_seconds: float, most_pixels: int) -> Iterator[tuple[float, Any]]:
    """(second, frame) of the first video stream, in the order they are shown."""
    with optional_package("av", extra="media"):
        import av  # optional
    kind = _container(content)
    with _reasons(), av.open(io.BytesIO(content), format=kind) as opened:
        if not opened.streams.video:
            raise ValueError("has no video stream")
        stream = opened.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("has a video stream of an unknown codec")
        stream.thread_type = "NONE"  # frames in flight take memory
        _check_size(stream.codec_context.width, stream.codec_context.height, most_pixels)
        first: float | None = None
        before, count = -1.0, 0
        for frame in opened.decode(stream):
            _check_size(frame.width, frame.height, most_pixels)
            if frame.time is None:
                raise ValueError(f"has no time for frame {count + 1}")
            first = frame.time if first is None else first
            second, count = float(frame.time - first), count + 1
            if second > most_seconds:
                raise ValueError(f"is longer than data.media.video_seconds={most_seconds:g}")
            if count > (second + 1) * _MOST_FRAMES_PER_SECOND:
                raise ValueError(f"has more than {_MOST_FRAMES_PER_SECOND:,} frames a second")
            if second < before:
                raise ValueError(f"goes back in time at frame {count}")
            before = second
            yield second, frame


def _check_size(width: int, height: int, most_pixels: int) -> None:
    if width * height > most_pixels:
        raise ValueError(f"has {width:,} x {height:,} pixels, more than data.media.most_pixels={most_pixels:,}")


@contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        # PyAV's errors of invalid data are ValueErrors too.
        if type(error) is ValueError:
            raise
        raise ValueError(f"cannot be decoded as video: {error}") from error
    except (OSError, EOFError, RuntimeError, LookupError, ArithmeticError, NotImplementedError) as error:
        raise ValueError(f"cannot be decoded as video: {error}") from error


def _container(content: bytes) -> str:
    """FFmpeg's name of the container. ValueError if it is not one that is read, or if the file ends too early."""
    if content[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        kind, size = "mov", _end_of_boxes(content)
    elif content.startswith(_EBML):
        kind, size = "matroska", _end_of_segment(content)
    elif content[:4] == b"RIFF" and content[8:12] == b"AVI ":
        kind, size = "avi", 8 + int.from_bytes(content[4:8], "little")
    else:
        raise ValueError("is not a video of a known container (mp4, mov, webm, mkv, avi)")
    if size > len(content):  # FFmpeg would give the frames that are there, without an error
        raise ValueError(f"has {len(content):,} of its {size:,} bytes: it is truncated")
    return kind


def _end_of_boxes(content: bytes) -> int:
    """Where the last box of an MP4 file ends (ISO/IEC 14496-12, 4.2)."""
    place = 0
    while place + 8 <= len(content):
        size = int.from_bytes(content[place : place + 4])
        if size == 1:
            size = int.from_bytes(content[place + 8 : place + 16])
        if size == 0:  # up to the end of the file
            return len(content)
        place += max(size, 8)
    return place


def _end_of_segment(content: bytes) -> int:
    """Where the segment of a Matroska file ends (RFC 8794); 0 if its size is not written, as in a live stream."""
    head = 4 + _width(content, 4)
    start = head + _number(content, 4)
    if content[start : start + 4] != b"\x18\x53\x80\x67":
        return 0
    width, size = _width(content, start + 4), _number(content, start + 4)
    return 0 if size == (1 << 7 * width) - 1 else start + 4 + width + size


def _width(content: bytes, place: int) -> int:
    """Bytes of a number of variable length."""
    return 9 - content[place].bit_length() if place < len(content) and content[place] else 8


def _number(content: bytes, place: int) -> int:
    width = _width(content, place)
    return int.from_bytes(content[place : place + width]) & ((1 << 7 * width) - 1)
