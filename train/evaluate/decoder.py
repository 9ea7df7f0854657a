"""What generates text for tasks: prompts in, continuations out. The tasks do not know how."""

from collections.abc import Sequence
from typing import Any, Protocol

from data.tokenizer import Tokenizer
from train.inference.decode import Sampling, generate


class Decoder(Protocol):
    """A model that continues texts."""

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        """The continuation of each prompt, in order: up to the end of the document, the first of the `stop` texts (which does
        not belong to it) or `max_new_tokens`."""


class OneByOne:
    """A whole model in this process, one prompt after another."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        """As `Decoder.generate`."""
        return [self._continue(prompt, max_new_tokens, stop, sampling) for prompt in prompts]

    def _continue(self, prompt: str, max_new_tokens: int, stop: Sequence[str], sampling: Sampling) -> str:
        ids, eod = self._tokenizer.prompt(prompt), self._tokenizer.eod
        decoder, text = self._tokenizer.incremental_decoder(), ""
        tokens = generate(self._model, ids, tokens=max_new_tokens, sampling=sampling, end_of_document=eod)
        for token in tokens:
            if token == eod:
                break
            text += decoder.feed(token)
            if (ended := before_stop(text, stop)) is not None:
                return ended
        text += decoder.finish()
        ended = before_stop(text, stop)
        return text if ended is None else ended


def before_stop(text: str, stop: Sequence[str]) -> str | None:
    """What is before the first stop text; None if none occurs."""
    places = [place for one in stop if one and (place := text.find(one)) >= 0]
    return text[: min(places)] if places else None
