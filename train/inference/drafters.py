"""Drafters guess the next tokens of texts; the engine checks the guesses with one forward pass (`train.inference.acceptance`).

    Ask(text so far, most) --Drafter.propose--> Draft(tokens, and the distributions that they were drawn from)

A drafter may be wrong as often as it likes: that costs time, never a token. `PromptLookup` is here, a small model is in
`train.inference.draft_model`. Heads that predict several tokens can be a third kind: `follow` gives the hidden states.
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
    """A text whose next tokens are to be guessed."""

    row: int
    """The text's row in the engine, until `Drafter.drop`."""
    tokens: Sequence[int]
    """All of its tokens."""
    most: int
    """Guesses at most; 0 if only the distribution of the next token is needed."""
    draw: Draw
    """What the next token is drawn with; the one after it has the next number."""


@dataclass(frozen=True)
class Draft:
    """Guesses for the next tokens of a text."""

    tokens: tuple[int, ...] = ()
    guesses: tuple[Guess, ...] = ()
    """If they were drawn from distributions: the guesses, and one more for the token after them. Otherwise none."""


@dataclass(frozen=True)
class Followed:
    """Tokens of a text that were read for good."""

    row: int
    tokens: Sequence[int]
    """All of the text's."""
    end: int
    """How many of them are read now."""
    hidden_TH: torch.Tensor | None
    """The model's hidden states of the newest of them, after the final norm. None: the prefix cache had them."""


class Drafter(ABC):
    """What the engine calls. Under tensor parallelism all ranks make the same calls and must give the same guesses."""

    shape: ModelConfig | None = None
    """Of a model whose caches belong to the engine's memory; None: there are none."""

    @abstractmethod
    def open(self, sizes: CacheSizes, *, step_tokens: int) -> None:
        """Called once by the engine. sizes: room for the caches of `shape`; step_tokens: tokens read at once at most."""

    @abstractmethod
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """Guess. `reserve` has been called for the tokens and the guesses."""

    @abstractmethod
    def follow(self, texts: Sequence[Followed]) -> None:
        """Tokens were read for good: parts of prompts, accepted guesses and the token before them."""

    def lag(self, row: int, tokens: int) -> int:
        """How many of the first `tokens` tokens of a text the drafter has still to read."""
        return 0

    def fits(self, row: int, tokens: int) -> bool:
        """Whether there is room for the first `tokens` tokens of a row."""
        return True

    @abstractmethod
    def reserve(self, row: int, tokens: int) -> None:
        """Take that room (`fits` has said yes)."""

    @abstractmethod
    def drop(self, row: int) -> None:
        """The row's text has ended or has to wait: let go of everything of it."""

    def bytes(self) -> int:
        """Bytes of the caches."""
        return 0


class PromptLookup(Drafter):
    """Guesses that a text continues as it did where its last tokens were before (arXiv 2304.04487): the longest match of at
    most `longest` and at least `shortest` tokens, the latest of equals. Costs no model; good for answers that repeat their
    prompt."""

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._texts: dict[int, bytearray] = {}
        """By row: the text as 32-bit numbers, so that a search is one over bytes."""

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
                period = len(tokens) - length - start  # past the text's end, the guesses continue as they began
                return tuple(tokens[start + length + index % period] for index in range(ask.most))
        return ()


_BYTES = array("i").itemsize


def _last_match(text: bytearray, length: int) -> int | None:
    """Where the last `length` tokens of a text were before, as the index of the first; the latest such place."""
    pattern = text[-length * _BYTES :]
    if len(text) <= len(pattern):
        return None
    found = text.rfind(pattern, 0, len(text) - _BYTES)
    while found >= 0 and found % _BYTES:  # not at a number's first byte
        found = text.rfind(pattern, 0, found + len(pattern) - 1)
    return found // _BYTES if found >= 0 else None
