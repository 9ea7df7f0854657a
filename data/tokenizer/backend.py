"""The interface of a tokenizer library, between `data.tokenizer` and the three kinds of files there are."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.schema.errors import DataError


class Unencodable(DataError):
    """A text that a tokenizer library cannot encode. The message follows the name of the text."""


LARGEST_VOCAB = 1 << 24
"""Ids of the largest vocabulary that is read: tables by id take memory for every id up to the largest."""


def check_ids(ids: Iterable[int]) -> None:
    """Refuse ids of tokens that are not whole numbers from 0 on, or so large that tables by id would not fit. ValueError."""
    for number in ids:
        if not isinstance(number, int) or not 0 <= number < LARGEST_VOCAB:
            raise ValueError(f"it has a token of id {number!r}; ids are whole numbers from 0 to {LARGEST_VOCAB - 1:,}")


class Backend(ABC):
    """One loaded tokenizer file. Encoding adds no special tokens and reads none in a text: what looks like one is text."""

    file: str
    """Name its file is kept under in a folder of prepared data."""
    vocab_size: int
    is_exact = True
    """Whether decoding gives a text back to the byte. Otherwise words come back, perhaps with other blanks."""
    special: Mapping[str, int]
    """Special tokens by name."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    @abstractmethod
    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Ids of several texts, whole-number arrays, on up to `threads` threads. Unencodable where one of them is."""

    @abstractmethod
    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes an id stands for, a part of a character perhaps; nothing for special tokens."""

    def image(self, text: str) -> str:
        """What decoding should give back: the text as the file's own normaliser leaves it."""
        return text

    @property
    def note(self) -> str | None:
        """What the user should know about the way this file is encoded."""
        return None

    @property
    def template_begin(self) -> str | None:
        """Special token that the file's own template puts before a text; None if it puts none, or has no template."""
        return None

    @property
    def unknown(self) -> int | None:
        """Id of the unknown token; None without one."""
        return None

    @abstractmethod
    def content(self) -> Any:
        """All that decides the ids of a text, without what is chance in the file; the same content is one tokenizer."""

    def tokenizer_json(self) -> dict[str, Any] | None:
        """Content of a `tokenizer.json` with the same ids for every text; None if no such conversion is known.

        DataError says which part of the tokenizer a `tokenizer.json` cannot represent.
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
