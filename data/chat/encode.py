"""A chat as token ids, each learned or not: what is written to a shard.

    line of JSON --thinking--> lessons --template--> text and spans --tokenizer--> ids, mask    one document each
    preference   --one chat per answer, its context included--> the same                        one document per answer

Learned are the assistant's messages, to the token, the end of their turn included. A template says with `{% generation %}` what
the assistant wrote, as for transformers' `return_assistant_tokens_mask`. For a template without it, an answer is what follows
the text up to where it would be generated, up to the special token that ends its turn. Of a preference, only the messages of the
answer itself are learned, not what the assistant said in the context.
"""

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.chat.pack import MarkedDocument
from data.chat.template import ChatError, Encoded, open_template
from data.chat.thinking import Lesson, has_answer, key_of, lessons, split_thinking
from data.system.closing import Closing
from data.tokenizer import Tokenizer
from recipes.schema.data import ChatConfig
from recipes.schema.errors import DataError


class ChatTooLong(ChatError):
    """A chat that is longer than a row."""


@dataclass(frozen=True)
class ChatDocument(MarkedDocument):
    """One chat, or one answer of a preference."""

    rank: int | None = None
    """Of an answer of a preference: its rank, 0 for the best."""
    begins_group: bool = False
    """Whether it is the first answer of its preference."""


class ChatEncoder(Closing):
    """Encodes the chats of one job. Close it, or use it as a context manager: it has a process."""

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer, *, row_tokens: int, seed: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._row_tokens = row_tokens
        self._seed = seed
        self._template = open_template(config.template, tokenizer)
        self._markers = (config.think_start, config.think_end)
        self.long_records = 0
        """Chats or preferences left out because they are longer than a row."""

    def close(self) -> None:
        """End the process that renders the template."""
        self._template.close()

    def documents(self, text: str) -> list[ChatDocument]:
        """The documents of one chat, none where it is left out because of its length.

        Raises ChatError for a chat that cannot be learned from, ChatTooLong for one that is longer than a row where that is
        refused, DataError for a template that cannot be used at all.
        """
        chat = json.loads(text)
        documents = (
            self._document(lesson, chat.get("tools")) for lesson in self._lessons(chat["messages"], chat, text)
        )
        return [fitted[0] for document in documents if (fitted := self._fitted([document]))]

    def answers(self, text: str) -> list[ChatDocument]:
        """The documents of one preference, one per ranked answer, best first, which belong into one row. None where it is left
        out because of its length. Raises as `documents`, and ChatError where answers of different ranks have the same tokens."""
        record = json.loads(text)
        context: list[dict[str, Any]] = record["context"]
        documents: list[ChatDocument] = []
        for answer in record["answers"]:
            messages = context + answer["messages"]
            lesson = self._lessons(messages, record, text)[-1]  # the last: with the thinking of the last turn only
            own = frozenset(place for place in lesson.learned if place >= len(context))
            document = self._document(Lesson(lesson.messages, own), record.get("tools"))
            if document.learned[-1]:
                # The end-of-document token ends the turn itself. A reward model must read the token that ends an answer, so
                # another label has to follow it in the document.
                ids, learned = np.append(document.ids, self._tokenizer.eod), np.append(document.learned, False)
                document = replace(document, ids=ids, learned=learned)
            documents.append(replace(document, rank=answer["rank"], begins_group=not documents))
        if _has_equal_answers(documents):
            raise ChatError("has answers of different ranks that the chat template and the tokenizer make equal")
        return self._fitted(documents)

    def _lessons(self, messages: list[dict[str, Any]], record: dict[str, Any], text: str) -> list[Lesson]:
        self._template.refuse_special(messages, tools=record.get("tools"), allowed=self._markers)
        for place, message in enumerate(messages, start=1):
            if message["role"] == "assistant" and not has_answer(message, self._config):
                raise ChatError(f"message {place} is an empty answer: it has thinking only")
        return lessons(messages, self._config, key=key_of(text, seed=self._seed), cut=self._first_tokens)

    def _document(self, lesson: Lesson, tools: Any) -> ChatDocument:
        encoded, text_bytes = self._encoded(lesson, tools)
        ids, learned, eod = encoded.ids, encoded.learned, self._tokenizer.eod
        if ids[-1] != eod:
            ids, learned = np.append(ids, eod), np.append(learned, False)
        return ChatDocument(ids, learned, text_bytes)

    def _fitted(self, documents: list[ChatDocument]) -> list[ChatDocument]:
        """Documents that belong into one row, as `long_record` has them if they are too long for it. Left out: none."""
        sizes = [len(document.ids) for document in documents]
        total, most, row = sum(sizes), self._row_tokens, self._row_tokens
        if total <= row:
            return documents
        match self._config.long_record:
            case "refuse":
                what = (
                    f"{total:,} tokens"
                    if len(sizes) == 1
                    else f"{len(sizes):,} answers of {total:,} tokens, each with its context"
                )
                raise ChatTooLong(
                    f"has {what}, more than a row of data.row_tokens={row:,}. Use longer rows, or set data.chat.long_record to "
                    f"drop (leave it out and count it) or cut (keep its beginning)."
                )
            case "cut":
                # The longest are cut to a common length, the largest that fits.
                most = (
                    bisect.bisect_right(range(row + 1), row, key=lambda size: sum(min(size, one) for one in sizes)) - 1
                )
                documents = [self._cut(document, most) for document in documents]
                if all(document.learned.any() for document in documents) and not _has_equal_answers(documents):
                    return documents
        self.long_records += 1
        return []

    def _cut(self, document: ChatDocument, most: int) -> ChatDocument:
        """The beginning of a document, `most` tokens with the end-of-document token."""
        if len(document.ids) <= most:
            return document
        kept = max(0, most - 1)
        ids, learned = np.append(document.ids[:kept], self._tokenizer.eod), np.append(document.learned[:kept], False)
        return replace(document, ids=ids, learned=learned)

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


def _has_equal_answers(documents: Sequence[ChatDocument]) -> bool:
    """Whether answers of different ranks have the same tokens."""
    ranks: dict[bytes, int | None] = {}
    return any(ranks.setdefault(document.ids.tobytes(), document.rank) != document.rank for document in documents)
