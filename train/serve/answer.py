"""Turns the events of one request into text: whole characters, stop strings, log-probabilities."""

from dataclasses import dataclass, field

from data.tokenizer import Tokenizer
from train.inference.request import Event, Token


@dataclass(frozen=True)
class Piece:
    """The next part of one choice of an answer."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    """`stop` or `length`, as OpenAI names them; set in the last piece."""


@dataclass(eq=False)
class Answer:
    """The text of one request as it grows. Text that may be the start of a stop string waits for the next token."""

    tokenizer: Tokenizer
    stop_strings: tuple[str, ...] = ()
    generated: int = 0
    """Number of tokens so far, including the one that ended the text."""
    guesses: int = 0
    """Number of guesses of a drafter that were checked."""
    accepted: int = 0
    """Number of guesses that became tokens."""
    _pending: str = ""
    _is_done: bool = field(default=False)

    def __post_init__(self) -> None:
        self._decoder = self.tokenizer.incremental_decoder()

    def piece(self, event: Event) -> Piece | None:
        """What to send to the client for an event; None: nothing. The last piece has `finish`; do not call this after it."""
        assert not self._is_done
        token = event.token
        tokens = () if token is None else (token,)
        self.generated += len(tokens)
        self.guesses += event.guesses or 0
        self.accepted += token is not None and token.is_guessed
        if token is not None and event.finish != "stop":  # a stop token is not text
            self._pending += self._decoder.feed(token.id)
        if event.finish is not None:
            self._pending += self._decoder.finish()
        found = min((at for at in map(self._pending.find, self.stop_strings) if at >= 0), default=None)
        if found is not None:
            self._is_done = True
            return Piece(self._pending[:found], tokens, "stop")
        if event.finish is not None:
            self._is_done = True
            return Piece(self._pending, () if event.finish == "stop" else tokens, event.finish)
        if token is None:
            return None
        waiting = self._possible_stop()
        end = len(self._pending) - waiting
        text, self._pending = self._pending[:end], self._pending[end:]
        return Piece(text, tokens)

    def _possible_stop(self) -> int:
        """How many characters at the end of the pending text may be the start of a stop string."""
        longest = min(max(map(len, self.stop_strings), default=1) - 1, len(self._pending))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self.stop_strings):
                return length
        return 0
