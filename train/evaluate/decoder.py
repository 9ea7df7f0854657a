"""Generates text for tasks: prompts --> continuations.

It also scores targets after contexts that are longer than the rows of training. It reads them in parts, into caches, so
memory does not grow with the square of the length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.tokenizer import IncrementalDecoder, Tokenizer
from recipes.schema.errors import NumericsError
from recipes.schema.model import ModelConfig
from train.evaluate.score import Request as ScoreRequest
from train.evaluate.score import Score
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Event, Request, Sampling, Token

_BATCH_TOKENS = 1 << 16
"""Tokens of texts that are decoded together: sixteen of 4,096, one of more than 32,768."""
_MOST_ROWS = 16


class Decoder(Protocol):
    """A model that continues texts."""

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        """The continuation of each prompt, in order. It ends at the end of the document, before the first of the `stop` texts,
        or after `max_new_tokens`."""

    def scores(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Like `train.evaluate.score.scores`, for requests of any length."""


@dataclass
class _Answer:
    """A continuation while it is generated."""

    decoder: IncrementalDecoder
    text: str = ""
    ended: str | None = field(default=None)
    """The text before a stop text."""


class BatchedDecoder:
    """A whole model in this process, many prompts at once (`train.inference.batch_engine`)."""

    def __init__(self, model: Any, shape: ModelConfig, tokenizer: Tokenizer) -> None:
        self._model, self._shape, self._tokenizer = model, shape, tokenizer

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        """See `Decoder.generate`. Raises NumericsError if logits are not finite."""
        if not prompts:
            return []
        tokenizer = self._tokenizer
        ids = [tokenizer.prompt(prompt) for prompt in prompts]
        engine = self._engine(len(ids), longest=max(map(len, ids)) + max_new_tokens)
        ends = frozenset({tokenizer.eod})
        answers = {
            engine.add(Request(prompt, max_new_tokens, sampling=sampling, stop=ends)): _Answer(
                tokenizer.incremental_decoder()
            )
            for prompt in ids
        }
        while not engine.is_idle:
            for event in engine.step():
                answer = answers[event.request]
                _check(event, list(answers))
                if event.token is None or answer.ended is not None or event.token.id == tokenizer.eod:
                    continue
                answer.text += answer.decoder.feed(event.token.id)
                answer.ended = before_stop(answer.text, stop)
                if answer.ended is not None:
                    engine.cancel(event.request)
        return [_whole(answer, stop) for answer in answers.values()]

    def scores(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """See `Decoder.scores`. Raises NumericsError if logits are not finite."""
        if not requests:
            return []
        engine = self._engine(len(requests), longest=max(len(r.context) + len(r.target) for r in requests))
        ids = [engine.add(Request(r.context + r.target, 0, score_from=len(r.context))) for r in requests]
        tokens: dict[int, list[Token]] = {id: [] for id in ids}
        while not engine.is_idle:
            for event in engine.step():
                _check(event, ids)
                tokens[event.request] += event.scores
        return [
            Score(math.fsum(token.logprob for token in tokens[id]), all(token.is_likeliest for token in tokens[id]))
            for id in ids
        ]

    def _engine(self, count: int, *, longest: int) -> InferenceEngine:
        """An engine for this many texts of at most `longest` tokens."""
        rows = max(1, min(_MOST_ROWS, count, _BATCH_TOKENS // longest))
        return InferenceEngine(self._model, self._shape, EngineConfig(rows=rows, context_tokens=longest))


def _check(event: Event, ids: Sequence[int]) -> None:
    if event.finish == "error":
        raise NumericsError(f"text {ids.index(event.request)}: {event.message}.")


def _whole(answer: _Answer, stop: Sequence[str]) -> str:
    if answer.ended is not None:
        return answer.ended
    text = answer.text + answer.decoder.finish()
    ended = before_stop(text, stop)
    return text if ended is None else ended


def before_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop text; None without a stop text."""
    places = [place for one in stop if one and (place := text.find(one)) >= 0]
    return text[: min(places)] if places else None
