"""Small images, sounds and videos, records of them in every form, and a tokenizer with placeholders."""

import atexit
import functools
import io
import json
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import soundfile

from data.tokenizer import train_tokenizer
from recipes.schema.data import DataConfig, MediaConfig, SourceConfig, TokenizerConfig

SPECIAL = {"<|image|>": 1, "<|audio|>": 2}


def pixels(seed: int, width: int = 40, height: int = 24) -> np.ndarray:
    """uint8 [height, width, 3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_bytes(content: np.ndarray | PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    out = io.BytesIO()
    image = content if isinstance(content, PIL.Image.Image) else PIL.Image.fromarray(content)
    image.save(out, kind, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has hardly any pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def tone(seconds: float = 0.3, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    """float64 [samples]"""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def audio_bytes(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV") -> bytes:
    """A sound file."""
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind)
    return out.getvalue()


def video_bytes(frames: Sequence[np.ndarray], per_second: int = 10, kind: str = "mp4", codec: str = "h264") -> bytes:
    """A video file of uint8 [height, width, 3] frames."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as opened:
        stream = opened.add_stream(codec, rate=per_second)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                opened.mux(packet)
        for packet in stream.encode():
            opened.mux(packet)
    return out.getvalue()


def grey_video(levels: Iterable[int], per_second: int = 10, **options: Any) -> bytes:
    """A video whose frames are of one grey each."""
    return video_bytes([np.full((32, 48, 3), level, dtype=np.uint8) for level in levels], per_second, **options)


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """A file of one record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of members by name."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            found = tarfile.TarInfo(name)
            found.size = len(content)
            tar.addfile(found, io.BytesIO(content))
    return path


@functools.cache
def media_tokenizer() -> Path:
    """The file of a tokenizer with the placeholders, trained once in this process."""
    folder = Path(tempfile.mkdtemp(prefix="stratum-media-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    texts = ["This is number 12, drawn and spoken. It sounds long <0.3 seconds>\n" * 20]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300, special_tokens=SPECIAL))
    tokenizer.save(folder / tokenizer.file)
    return folder / tokenizer.file


def media_config(
    folder: Path, path: str | Path, *, row_tokens: int = 64, media: MediaConfig | None = None, **source: Any
) -> DataConfig:
    """A recipe's data with one source of media, prepared below `folder`, with small patches."""
    return DataConfig(
        folder=str(folder / "prepared"),
        sources={"media": SourceConfig(path=str(path), kind="media", **source)},
        tokenizer=TokenizerConfig(path=str(media_tokenizer())),
        media=media or MediaConfig(patch=4, image_patches=16, video_patches=6, frames_per_second=5.0, video_frames=4),
        row_tokens=row_tokens,
        heldout_fraction=0.1,
        workers=1,
    )
