"""Drafters guess the next tokens of texts; the engine checks the guesses with one forward pass (`train.inference.acceptance`).

    Ask(text so far, most) --Drafter.propose--> Draft(tokens, and the distributions that they were drawn from)

Wrong guesses cost time, but never change a token. `PromptLookup` is here, a small model in `train.inference.draft_model`, the
model's own further depths in `train.inference.depth_drafter`.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from launch.plan.cost.inference import CacheSizes
from recipes.schema.model import ModelConfig
from train.inference.acceptance import Guess
from train.inference.sampling import Draw


@dataclass(frozen=True)
class Ask:
    """A text whose next tokens should be guessed."""

    row: int
    """The text's row in the engine, until `Drafter.drop`."""
    tokens: Sequence[int]
    """All of its tokens."""
    most: int
    """Largest number of guesses; 0: only the distribution of the next token is needed."""
    draw: Draw
    """Options and number of the next token's draw; the token after it has the next number."""


@dataclass(frozen=True)
class Draft:
    """Guesses for the next tokens of a text."""

    tokens: tuple[int, ...] = ()
    guesses: tuple[Guess, ...] = ()
    """The distributions that the guesses were drawn from, and that of the token after them; empty without distributions."""


@dataclass(frozen=True)
class Followed:
    """Final tokens of a text that were read."""

    row: int
    tokens: Sequence[int]
    """All tokens of the text."""
    end: int
    """How many of them have been read so far."""
    hidden_TH: torch.Tensor | None
    """The model's hidden states of the newest of them, after the final norm. None: they were in the prefix cache."""


class Drafter(ABC):
    """The interface that the engine calls. Under tensor parallelism all ranks make the same calls and return the same guesses."""

    shape: ModelConfig | None = None
    """Shape of the model whose caches are in the engine's memory; None: no caches."""

    @abstractmethod
    def open(self, sizes: CacheSizes, *, step_tokens: int) -> None:
        """Called once by the engine. sizes: of the caches for `shape`; step_tokens: largest number of tokens read at once."""

    @abstractmethod
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """Guess. `reserve` has been called for the tokens and the guesses."""

    @abstractmethod
    def follow(self, texts: Sequence[Followed]) -> None:
        """Called after final tokens were read: parts of prompts, accepted guesses and the token before them."""

    def lag(self, row: int, tokens: int) -> int:
        """How many of the first `tokens` tokens of a text the drafter has not read yet."""
        return 0

    def fits(self, row: int, tokens: int) -> bool:
        """Whether the caches have room for the first `tokens` tokens of a row."""
        return True

    @abstractmethod
    def reserve(self, row: int, tokens: int) -> None:
        """Take that room. Call `fits` first."""

    @abstractmethod
    def drop(self, row: int) -> None:
        """The row's text has ended or has to wait: release its caches."""

    def bytes(self) -> int:
        """Bytes of the caches."""
        return 0


class PromptLookup(Drafter):
    """Guesses that a text continues as after an earlier occurrence of its last tokens (arXiv 2304.04487): the longest match of
    `shortest` to `longest` tokens, and the latest among equals. Needs no model; useful if answers repeat their prompt."""

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._texts: dict[int, bytearray] = {}
        """By row: the text as 32-bit numbers, so that it can be searched as bytes."""

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [Draft(self._guess(ask)) if ask.most else Draft() for ask in asks]

    def drop(self, row: int) -> None:
        self._texts.pop(row, None)

    def open(self, sizes: CacheSizes, *, step_tokens: int) -> None:
        pass

    def follow(self, texts: Sequence[Followed]) -> None:
        pass

    def reserve(self, row: int, tokens: int) -> None:
        pass

    def _guess(self, ask: Ask) -> tuple[int, ...]:
        text, tokens = self._texts.setdefault(ask.row, bytearray()), ask.tokens
        text += array("i", tokens[len(text) // _BYTES :]).tobytes()
        for length in self._lengths:
            start = _last_match(text, length)
            if start is not None:
                period = len(tokens) - length - start  # beyond the end of the text, the guesses repeat from their start
                return tuple(tokens[start + length + index % period] for index in range(ask.most))
        return ()


_BYTES = array("i").itemsize


def _last_match(text: bytearray, length: int) -> int | None:
    """Index of the latest earlier occurrence of the last `length` tokens of a text."""
    pattern = text[-length * _BYTES :]
    if len(text) <= len(pattern):
        return None
    found = text.rfind(pattern, 0, len(text) - _BYTES)
    while found >= 0 and found % _BYTES:  # the match does not start at the first byte of a number
        found = text.rfind(pattern, 0, found + len(pattern) - 1)
    return found // _BYTES if found >= 0 else None
