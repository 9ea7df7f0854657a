"""What generates text for tasks: prompts in, continuations out. The tasks do not know how."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.tokenizer import IncrementalDecoder, Tokenizer
from recipes.schema.errors import NumericsError
from recipes.schema.model import ModelConfig
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Request, Sampling

_BATCH_TOKENS = 1 << 16
"""Tokens of texts that are decoded together: sixteen of 4,096, one of more than 32,768."""
_MOST_ROWS = 16


class Decoder(Protocol):
    """A model that continues texts."""

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        """The continuation of each prompt, in order: up to the end of the document, the first of the `stop` texts (which does
        not belong to it) or `max_new_tokens`."""


@dataclass
class _Answer:
    """One continuation as it grows."""

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
        """As `Decoder.generate`. Raises NumericsError if logits are not finite."""
        if not prompts:
            return []
        tokenizer = self._tokenizer
        ids = [tokenizer.prompt(prompt) for prompt in prompts]
        longest = max(map(len, ids)) + max_new_tokens
        rows = max(1, min(_MOST_ROWS, len(ids), _BATCH_TOKENS // longest))
        engine = InferenceEngine(self._model, self._shape, EngineConfig(rows=rows, context_tokens=longest))
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
                if event.finish == "error":
                    place = list(answers).index(event.request)
                    raise NumericsError(f"prompt {place}: {event.message}.")
                if event.token is None or answer.ended is not None or event.token.id == tokenizer.eod:
                    continue
                answer.text += answer.decoder.feed(event.token.id)
                answer.ended = before_stop(answer.text, stop)
                if answer.ended is not None:
                    engine.cancel(event.request)
        return [_whole(answer, stop) for answer in answers.values()]


def _whole(answer: _Answer, stop: Sequence[str]) -> str:
    if answer.ended is not None:
        return answer.ended
    text = answer.text + answer.decoder.finish()
    ended = before_stop(text, stop)
    return text if ended is None else ended


def before_stop(text: str, stop: Sequence[str]) -> str | None:
    """What is before the first stop text; None if none occurs."""
    places = [place for one in stop if one and (place := text.find(one)) >= 0]
    return text[: min(places)] if places else None
