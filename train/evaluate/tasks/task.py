"""An open task: items with a prompt and targets, and how an answer is judged."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from data.tokenizer import Tokenizer
from train.evaluate.score import Request

Kind = Literal["cloze", "multiple_choice", "rolling", "generate"]


@dataclass(frozen=True)
class Item:
    """One question."""

    place: str
    """Its origin, for messages: `capitals.jsonl:3`, `needle-4k 7`."""
    prompt: str
    """The text that the model reads; for a rolling task, the whole text."""
    targets: tuple[str, ...] = ()
    """The texts that may follow: the target of a cloze, all choices, or the expected answer."""
    answer: int = 0
    """Index of the right target."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Data for the judge of a generated answer."""


@dataclass(frozen=True)
class Task:
    """An open task."""

    name: str
    kind: Kind
    items: tuple[Item, ...]
    end_of_document: bool = False
    """Whether targets end with the end-of-document token."""
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    judge: Callable[[Item, str], float] | None = None
    """Score of a generated answer, 0 to 1; None for tasks that are scored by likelihood."""
    is_graded: bool = False
    """Whether scores between 0 and 1 are possible."""
    runs_code: bool = False
    """Whether judging runs code that the model wrote."""
    row_tokens: int = 0
    """Row length in tokens that the items need; 0: that of training."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other settings that the result depends on."""

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of all prompts and expected answers: tasks with equal hashes are equal."""
        plain = {
            "kind": self.kind, "items": [asdict(item) | {"place": ""} for item in self.items],
            "end_of_document": self.end_of_document, "max_new_tokens": self.max_new_tokens, "stop": self.stop,
            "settings": dict(self.settings),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()

    def texts(self) -> list[tuple[str, str]]:
        """(place, text) of each item as a corpus might contain it: the prompt with the right target."""
        return [(item.place, item.prompt + (item.targets[item.answer] if item.targets else "")) for item in self.items]


def begin_token(tokenizer: Tokenizer) -> int:
    """The token before the first token of a text: begin-of-document, or else end-of-document."""
    return tokenizer.eod if tokenizer.bod is None else tokenizer.bod


def context_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a context, after the begin-of-document token if the tokenizer has one. An empty context is that token, or else the
    end-of-document token."""
    return tokenizer.prompt(text)


def split_pair(tokenizer: Tokenizer, context: str, target: str) -> tuple[list[int], list[int]]:
    """Ids of a context and ids of its target, taken from the ids of the whole text if no token spans the border.

    Blanks at the end of the context belong to the target, as in lm-evaluation-harness: most tokenizers join them to the next
    word. If a token spans the border, context and target are encoded separately, so that no target is empty or lacks bytes.
    """
    blanks = len(context) - len(context.rstrip(" "))
    if blanks and context.strip(" "):
        context, target = context[:-blanks], " " * blanks + target
    before = context_ids(tokenizer, context)
    whole = [*([] if tokenizer.bod is None else [tokenizer.bod]), *tokenizer.encode(context + target)]
    if context and whole[: len(before)] == before and len(whole) > len(before):
        return before, whole[len(before) :]
    return before, tokenizer.encode(target)


def request_of(tokenizer: Tokenizer, context: str, target: str, *, end_of_document: bool = False) -> Request:
    """The request that scores `target` after `context`."""
    before, after = split_pair(tokenizer, context, target)
    return Request(tuple(before), (*after, *([tokenizer.eod] if end_of_document else [])))
