"""Generates text for tasks: prompts --> continuations.

Data-parallel ranks share the prompts; every rank gets all answers. The decoder also scores targets after
contexts that are longer than the rows of training. It reads them in parts, into caches, so memory does not grow with the
square of the length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.tokenizer import IncrementalDecoder, Tokenizer
from recipes.schema.errors import NumericsError
from recipes.schema.model import ModelConfig
from train.evaluate.deal import evaluating, in_parts
from train.evaluate.score import Request as ScoreRequest
from train.evaluate.score import Score
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Event, Request, Sampling, Token
from train.parallel.mesh import Mesh

_BATCH_TOKENS = 1 << 16
"""Tokens of texts that are decoded together: sixteen of 4,096, one of more than 32,768."""
_MOST_ROWS = 16


class Decoder(Protocol):
    """A model that continues texts."""

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        """The continuation of each prompt, in order. It ends at the end of the document, before the first of the `stop` texts,
        or after `max_new_tokens`. Collective over the world; the same on every rank."""

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
    """A whole model on this rank, or this tensor rank's part: many prompts at once (`train.inference.batch_engine`).

    The weights are used where they are, so that a model that trains can be asked between two steps. Its layout has no pipeline
    and context ranks, and does not split the sequence.
    """

    def __init__(self, model: Any, shape: ModelConfig, tokenizer: Tokenizer, *, mesh: Mesh) -> None:
        self._model, self._shape, self._tokenizer, self._mesh = model, shape, tokenizer, mesh

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        """See `Decoder.generate`. Raises NumericsError if logits are not finite."""

        def continued(places: range) -> list[str]:
            mine = [prompts[place] for place in places]
            with evaluating([self._model]):
                return self._generated(mine, places, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)

        return in_parts(self._mesh, len(prompts), continued)

    def scores(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """See `Decoder.scores`. Raises NumericsError if logits are not finite.

        Groups of texts that are read together are dealt, so that no score depends on the number of ranks.
        """
        if not requests:
            return []
        longest = max(len(request.context) + len(request.target) for request in requests)
        rows = _rows(len(requests), longest)

        def scored(groups: range) -> list[list[Score]]:
            with evaluating([self._model]):
                return [
                    self._scored(requests, range(rows * group, min(rows * (group + 1), len(requests))), longest=longest)
                    for group in groups
                ]

        groups = in_parts(self._mesh, math.ceil(len(requests) / rows), scored)
        return [score for group in groups for score in group]

    def _generated(
        self, prompts: Sequence[str], places: range, *, max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        if not prompts:
            return []
        tokenizer = self._tokenizer
        ids = [tokenizer.prompt(prompt) for prompt in prompts]
        longest = max(map(len, ids)) + max_new_tokens
        engine = self._engine(_rows(len(ids), longest), longest=longest)
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
                _check(event, list(answers), places)
                if event.token is None or answer.ended is not None or event.token.id == tokenizer.eod:
                    continue
                answer.text += answer.decoder.feed(event.token.id)
                answer.ended = before_stop(answer.text, stop)
                if answer.ended is not None:
                    engine.cancel(event.request)
        return [_whole(answer, stop) for answer in answers.values()]

    def _scored(self, requests: Sequence[ScoreRequest], places: range, *, longest: int) -> list[Score]:
        engine = self._engine(len(places), longest=longest)
        ids = [
            engine.add(Request(request.context + request.target, 0, score_from=len(request.context)))
            for request in requests[places.start : places.stop]
        ]
        tokens: dict[int, list[Token]] = {id: [] for id in ids}
        while not engine.is_idle:
            for event in engine.step():
                _check(event, ids, places)
                tokens[event.request] += event.scores
        return [
            Score(math.fsum(token.logprob for token in tokens[id]), all(token.is_likeliest for token in tokens[id]))
            for id in ids
        ]

    def _engine(self, rows: int, *, longest: int) -> InferenceEngine:
        """An engine that runs so many texts of at most `longest` tokens together."""
        return InferenceEngine(self._model, self._shape, EngineConfig(rows=rows, context_tokens=longest))


def _rows(count: int, longest: int) -> int:
    """How many of `count` texts of at most `longest` tokens are decoded together."""
    return max(1, min(_MOST_ROWS, count, _BATCH_TOKENS // longest))


def _check(event: Event, ids: Sequence[int], places: range) -> None:
    """places: the numbers of the texts of `ids` among those of all ranks."""
    if event.finish == "error":
        raise NumericsError(f"text {places[ids.index(event.request)]}: {event.message}.")


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
