"""The interface of the three tokenizer libraries, one for each kind of file."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.schema.errors import DataError


class Unencodable(DataError):
    """A tokenizer library cannot encode a text. The message is the rest of a sentence that begins with the text's name."""


LARGEST_VOCAB = 1 << 24
"""Limit for ids, because tables by id take memory for every id up to the largest."""


def check_ids(ids: Iterable[int]) -> None:
    """ValueError for ids that are not integers from 0 on, or so large that tables by id would not fit into memory."""
    for number in ids:
        if not isinstance(number, int) or not 0 <= number < LARGEST_VOCAB:
            raise ValueError(f"it has a token of id {number!r}, but ids are integers from 0 to {LARGEST_VOCAB - 1:,}")


class Backend(ABC):
    """One loaded tokenizer file. Encoding gives no special tokens: their names in a text are encoded as ordinary text."""

    file: str
    """Name of its file in a folder of prepared data."""
    vocab_size: int
    is_exact = True
    """Whether decoding returns exactly the text. Otherwise it returns the same words, maybe with other blanks."""
    special: Mapping[str, int]
    """{name: id} of the special tokens."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    @abstractmethod
    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Ids of several texts, as integer arrays, with up to `threads` threads. Unencodable if one cannot be encoded."""

    @abstractmethod
    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes of an id, maybe only part of a character. No bytes for special tokens."""

    def image(self, text: str) -> str:
        """The text after the file's own normaliser, which decoding should return."""
        return text

    @property
    def keeps_bytes(self) -> bool:
        """Whether the ids of any text have together at least as many bytes as the text. False if that is not known."""
        return self.is_exact

    @property
    def note(self) -> str | None:
        """What the user should know about how texts are encoded with this file."""
        return None

    @property
    def template_begin(self) -> str | None:
        """Special token that the file's own template puts before a text; None if it puts none or there is no template."""
        return None

    @property
    def unknown(self) -> int | None:
        """Id of the unknown token; None without one."""
        return None

    @abstractmethod
    def content(self) -> Any:
        """Everything in the file that decides the ids of a text, and nothing else. The same content is the same tokenizer."""

    def tokenizer_json(self) -> dict[str, Any] | None:
        """Content of a `tokenizer.json` with the same ids for every text; None if no such conversion is known.

        DataError names the part of the tokenizer that a `tokenizer.json` cannot represent.
        """
        return None

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write a file that loads to the same tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return b"".join(map(self.bytes_of, ids)).decode(errors="replace")


def fingerprint(backend: Backend) -> str:
    """sha256 of a tokenizer's content."""
    return hashlib.sha256(json.dumps(backend.content(), sort_keys=True).encode()).hexdigest()
