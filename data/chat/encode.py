"""A chat as token ids, each learned or not: what is written to a shard.

    line of JSON --thinking--> lessons --template--> text and spans --tokenizer--> ids, mask    one document each

Learned are the assistant's messages, to the token, the end of their turn included. A template says with `{% generation %}` what
the assistant wrote, as for transformers' `return_assistant_tokens_mask`. For a template without it, an answer is what follows
the text up to where it would be generated, up to the special token that ends its turn.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from data.chat.template import ChatError, Encoded, open_template
from data.chat.thinking import Lesson, has_answer, key_of, lessons, split_thinking
from data.tokenizer import Tokenizer
from recipes.schema.data import ChatConfig
from recipes.schema.errors import DataError


class ChatTooLong(ChatError):
    """A chat that is longer than a row."""


@dataclass(frozen=True)
class ChatDocument:
    """One chat, as it is stored: it ends with the end-of-document token."""

    ids: np.ndarray
    """int64 [tokens]"""
    learned: np.ndarray
    """bool [tokens]"""
    text_bytes: int


class ChatEncoder:
    """Encodes the chats of one job. Close it, or use it as a context manager: it has a process."""

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer, *, row_tokens: int, seed: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._row_tokens = row_tokens
        self._seed = seed
        self._template = open_template(config.template, tokenizer)
        self._markers = (config.think_start, config.think_end)
        self.long_records = 0
        """Chats left out because they are longer than a row."""

    def __enter__(self) -> "ChatEncoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._template.close()

    def documents(self, text: str) -> list[ChatDocument]:
        """The documents of one chat, none where it is left out because of its length.

        Raises ChatError for a chat that cannot be learned from, ChatTooLong for one that is longer than a row where that is
        refused, DataError for a template that cannot be used at all.
        """
        chat = json.loads(text)
        tools = chat.get("tools")
        self._template.refuse_special(chat["messages"], tools=tools, allowed=self._markers)
        for place, message in enumerate(chat["messages"], start=1):
            if message["role"] == "assistant" and not has_answer(message, self._config):
                raise ChatError(f"message {place} is an empty answer: it has thinking only")
        found = lessons(chat["messages"], self._config, key=key_of(text, seed=self._seed), cut=self._first_tokens)
        return [document for lesson in found if (document := self._document(lesson, tools)) is not None]

    def _document(self, lesson: Lesson, tools: Any) -> ChatDocument | None:
        encoded, text_bytes = self._encoded(lesson, tools)
        ids, learned, eod = encoded.ids, encoded.learned, self._tokenizer.eod
        if ids[-1] != eod:
            ids, learned = np.append(ids, eod), np.append(learned, False)
        if len(ids) > self._row_tokens:
            match self._config.long_record:
                case "refuse":
                    raise ChatTooLong(
                        f"has {len(ids):,} tokens, more than a row of data.row_tokens={self._row_tokens:,}. Use longer "
                        f"rows, or set data.chat.long_record to drop (leave it out and count it) or cut (keep its beginning)."
                    )
                case "cut":
                    most = self._row_tokens - 1
                    ids, learned = np.append(ids[:most], eod), np.append(learned[:most], False)
            if len(ids) > self._row_tokens or not learned.any():
                self.long_records += 1
                return None
        return ChatDocument(ids, learned, text_bytes)

    def _encoded(self, lesson: Lesson, tools: Any) -> tuple[Encoded, int]:
        kept = (*self._markers, self._config.stripped_thinking)
        rendered = self._template.render(lesson.messages, tools=tools, kept=kept)
        answers = [place for place, message in enumerate(lesson.messages) if message["role"] == "assistant"]
        if self._template.is_tagged:
            spans = rendered.spans
            if len(spans) != len(answers):
                raise ChatError(
                    f"the chat template marks {len(spans)} answers with {{% generation %}}, but there are {len(answers)}"
                )
        else:
            spans = tuple(self._span(lesson.messages, place, tools, rendered.text) for place in answers)
        for place, (start, stop) in zip(answers, spans, strict=True):
            self._check_span(lesson.messages[place], rendered.text[start:stop], is_learned=place in lesson.learned)
        chosen = [span for place, span in zip(answers, spans, strict=True) if place in lesson.learned]
        encoded = self._template.encode(rendered.text, chosen, is_checked=True)
        if not encoded.learned.any():
            raise ChatError("it has no token to learn")
        return encoded, len(rendered.text.encode())

    def _span(self, messages: Sequence[Mapping[str, Any]], place: int, tools: Any, whole: str) -> tuple[int, int]:
        """Characters of one answer, by a template that does not mark it."""
        before = self._template.render(messages[:place], tools=tools, add_generation_prompt=True).text
        after = self._template.render(messages[: place + 1], tools=tools).text
        if not (after.startswith(before) and whole.startswith(after.rstrip())):
            raise ChatError(
                "the chat template writes a message differently when others follow, so it cannot be seen what the model would "
                "generate. Put {% generation %} and {% endgeneration %} around the answer in the template"
            )
        ends = list(self._template.special_tokens(after[len(before) :]))
        stop = len(before) + ends[-1] if ends else len(after)
        return len(before), stop

    def _check_span(self, message: Mapping[str, Any], text: str, *, is_learned: bool) -> None:
        """An answer must be in the text, with its thinking, and its turn must end."""
        ends = list(self._template.special_tokens(text))
        if not ends or text[ends[-1] :].strip():
            raise DataError(
                f"the chat template {self._config.template} does not end an answer with a special token of the tokenizer: a "
                f"model that learns it would never stop. Use a template with an end-of-turn, or a tokenizer that has its token "
                f"(data.tokenizer.special_tokens)."
            )
        thinking, answer = split_thinking(message, self._config)
        wanted = {"answer": answer, "thinking of an answer": thinking if is_learned else ""}
        for name, words in wanted.items():
            if words.strip() not in text:
                raise ChatError(f"the chat template leaves out the {name}")

    def _first_tokens(self, text: str, count: int) -> str:
        """The beginning of a text, `count` tokens at most, in whole characters."""
        ids = self._tokenizer.encode(text)
        return text if len(ids) <= count else self._tokenizer.decode(ids[:count]).rstrip("\ufffd")
