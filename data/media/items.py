"""What a document has besides its tokens: a table of items, each a run of placeholders and the bytes it stands for.

    PREFIX.items.bin/.idx   int64, one row a document: its number of items, then `NUMBERS` numbers of each
    PREFIX.media.bin/.idx   uint8, one row a file: original bytes, each content once a shard

Both are sets of files in the format of the shard itself (`data.store.shards`), with its checksums and copies.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from recipes.schema.errors import DataError

IMAGE, AUDIO, FRAME = range(3)
"""Kinds of items; a video is a FRAME for each frame that is read."""
NAMES = ("image", "audio", "frame")
NUMBERS = 7


@dataclass(frozen=True)
class Item:
    """A run of placeholders."""

    kind: int
    slot: int
    """Index of its first placeholder among the document's tokens."""
    tokens: int
    """Length of the run."""
    rows: int
    """Rows of patches; of audio: log-mel frames."""
    columns: int
    """Columns of patches; of audio: mel bands."""
    file: int
    """Number of its bytes in the shard's set of media; of an item that is not yet written, in its document."""
    microseconds: int = 0
    """Of a frame: its time in the video."""


def seen_size(item: Item) -> str:
    """Size of an item for a reader: patches or log-mel frames, and the time of a frame of a video."""
    size = f"{item.rows} frames of 10 ms" if item.kind == AUDIO else f"{item.rows} x {item.columns} patches"
    return size + (f" at {item.microseconds / 1e6:g} s" if item.kind == FRAME else "")


def pack(items: Sequence[Item]) -> np.ndarray:
    """int64: a document's row of the table."""
    return np.array([len(items), *(number for item in items for number in astuple(item))], dtype=np.int64)


def unpack(numbers: np.ndarray, *, where: str, document_tokens: int, files: int) -> list[Item]:
    """The items of a document's row. DataError, naming the file `where`, for numbers that `pack` never wrote."""
    plain = numbers.tolist()
    count = plain[0] if plain else -1
    if len(plain) != 1 + NUMBERS * count:
        raise DataError(f"{where} has a row of {len(plain):,} numbers for {count:,} items. Prepare the data again.")
    items = [Item(*plain[1 + NUMBERS * place : 1 + NUMBERS * (place + 1)]) for place in range(count)]
    end = 0
    for item in items:
        is_right = (
            item.kind in (IMAGE, AUDIO, FRAME)
            and end <= item.slot
            and 0 < item.tokens <= document_tokens - item.slot
            and 0 <= item.file < files
            and item.rows > 0
            and item.columns > 0
            and (item.kind == AUDIO or item.tokens == item.rows * item.columns)
        )
        if not is_right:
            raise DataError(f"{where} has an item that cannot be: {item}. Prepare the data again.")
        end = item.slot + item.tokens
    return items
