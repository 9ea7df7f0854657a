"""A chat template: from messages to text, spans of what the assistant wrote, and token ids.

    messages --render.py, a confined process--> text --special tokens, tokenizer--> ids [, which of them are learned]

The one implementation for preparing, `generate --chat` and the server. The ids are those of transformers' `apply_chat_template`,
except that a special token may only come from the template: else the author of a message could end it and write the next
speaker's part. Refused is a message or tool with the text of a special token, in any field; and, because templates change texts,
a chat whose rendered text has other special tokens than it has with inert text in place of all messages and tools.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from data.chat.record import REASONING, ROLES
from data.system.closing import Closing
from data.tokenizer import Tokenizer, Unencodable
from recipes.schema.data import CHAT_TEMPLATES, ChatConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable, read_bounded_text

Message = Mapping[str, Any]
_FOLDER = Path(__file__).with_name("templates")
_SCRIPT = Path(__file__).with_name("render.py")
_SWITCHES = ("/think", "/no_think")
"""Words in messages that choose the mode of a model; templates branch on them."""
_THINKING = (ChatConfig.think_start, ChatConfig.think_end)
"""Markers around thinking, if no recipe names others."""
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_FIELDS = ("role", "content", "tool_calls", *REASONING)
_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ")
"""Variables of the environment that the process gets: what Python may need to start, and the time zone of dates."""
_STOPS = {"plain": ("\n\nUser:", "\n\nSystem:")}
"""Texts that end an answer, of built-in templates without an end-of-turn."""


class ChatError(DataError):
    """Messages that a template cannot take, or text that cannot be learned from. The message says why."""


class ChatTimeout(ChatError):
    """Messages on which a template takes too long."""


@dataclass(frozen=True)
class Rendered:
    """The text of a chat."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters inside each `{% generation %}`, in order."""


class ChatTemplate(Closing):
    """A template and the process that renders it. Close it, or use it as a context manager. Safe for threads."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, place: str, stop_strings: tuple[str, ...] = ()) -> None:
        """place: name for messages. The template is compiled when it is first used."""
        self.source = source
        self.place = place
        self.stop_strings = stop_strings
        """Texts that end an answer, for templates without an end-of-turn."""
        self.is_tagged = bool(_TAG.search(source))
        """Whether the template says with `{% generation %}` what the assistant wrote."""
        self._tokenizer = tokenizer
        self._special = tokenizer.special
        names = {id: name for name, id in self._special.items()}
        self._eos, self._bos = names[tokenizer.eod], names.get(tokenizer.bod or -1, "")
        longest_first = sorted((name for name in self._special if name), key=len, reverse=True)
        self._longest_first = longest_first
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the process. Rendering again starts another one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
            process.wait()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Any = None,
        add_generation_prompt: bool = False,
        date: float | None = None,
        options: Mapping[str, Any] | None = None,
        kept: Sequence[str] | None = None,
    ) -> Rendered:
        """The text of a chat. date: seconds since 1970 for templates that ask for today's date; None refuses them.

        kept: refuse special tokens that come out of messages or tools. The template may branch on these words in them, which
        stay in the inert text. None: the chat is not checked.

        Raises ChatError, ChatTimeout; DataError for a template that is not valid Jinja.
        """
        chat = {
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._bos,
            "eos_token": self._eos,
            "date": date,
            "kept": None if kept is None else sorted({*kept, *_SWITCHES} - {""}, key=len, reverse=True),
            **(options or {}),
        }
        with self._lock:
            answer = self._ask(chat)
        if "text" not in answer:
            raise ChatError(printable(str(answer["error"]), most=600))
        text, written = answer["text"], answer["written"]
        if written is not None and (found := self._split.findall(text)) != written:
            pairs = zip_longest(found, written)
            name = next(one or other for one, other in pairs if one != other)
            raise ChatError(
                f"the chat template writes other special tokens with these messages than with inert text in their place (the "
                f"first is {name!r}): a message could speak for another. Change the messages, or the template"
            )
        return Rendered(text, tuple((start, stop) for start, stop in answer["spans"]))

    def ids(self, messages: Sequence[Message], *, tools: Any = None, has_date: bool = True) -> list[int]:
        """Token ids of a chat up to where the model answers. has_date: the template may write today's date. Raises ChatError,
        DataError as `render`."""
        self.refuse_special(messages, tools=tools)
        date = time.time() if has_date else None
        rendered = self.render(messages, tools=tools, add_generation_prompt=True, date=date, kept=_THINKING)
        return self.encode(rendered.text, ()).ids.tolist()

    def refuse_special(self, messages: Sequence[Message], *, tools: Any = None, allowed: Sequence[str] = ()) -> None:
        """ChatError for messages or tools with the text of a special token. allowed: what the assistant may write."""
        written = [("a message contains", message) for message in messages] + [("the tools contain", tools)]
        for what, value in written:
            found = [name for text in _texts_in(value) for name in self._split.findall(text)]
            if isinstance(value, Mapping) and value.get("role") == "assistant":
                found = [name for name in found if name not in allowed]
            if found:
                raise ChatError(f"{what} {found[0]!r}, a special token of this model. Remove it")

    def special_tokens(self, text: str) -> list[int]:
        """Where the special tokens in a text end."""
        return [found.end() for found in self._split.finditer(text)]

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The special token that ends an answer, if the template has one. Raises as `render`."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        text = self.render([question, answer], date=0).text
        found = self._split.findall(text[text.rfind("answer") :])
        return frozenset({self._special[found[0]]} if found else ())

    def encode(self, text: str, spans: Sequence[tuple[int, int]], *, is_checked: bool = False) -> "Encoded":
        """Ids of a rendered text, and which of them have a character inside one of `spans`.

        is_checked: ChatError for text that the tokenizer cannot give back.
        """
        ids: list[np.ndarray] = []
        learned: list[np.ndarray] = []
        at = 0
        for index, part in enumerate(self._split.split(text)):
            if not part:
                continue
            inside = [(max(0, a - at), min(len(part), b - at)) for a, b in spans if a < at + len(part) and b > at]
            if index % 2:
                numbers = np.array([self._special[part]])
                flags = np.full(1, bool(inside))
            else:
                numbers = self._text_ids(part, is_checked=is_checked)
                flags = self._flags(part, numbers, inside)
            ids.append(numbers)
            learned.append(flags)
            at += len(part)
        bod = self._tokenizer.bod
        if bod is not None and not (ids and ids[0][0] == bod):
            ids.insert(0, np.array([bod]))
            learned.insert(0, np.zeros(1, dtype=bool))
        if not ids:
            return Encoded(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool))
        return Encoded(np.concatenate(ids).astype(np.int64), np.concatenate(learned))

    def _text_ids(self, text: str, *, is_checked: bool) -> np.ndarray:
        try:
            ids = np.asarray(self._tokenizer.encode(text), dtype=np.int64)
        except Unencodable as error:
            raise ChatError(str(error)) from error
        problem = self._tokenizer.loss(text, ids) if is_checked else None
        if problem is not None:
            raise ChatError(problem)
        return ids

    def _flags(self, part: str, ids: np.ndarray, inside: Sequence[tuple[int, int]]) -> np.ndarray:
        """Which tokens of a text without special tokens overlap characters `inside`."""
        flags = np.zeros(len(ids), dtype=bool)
        if not inside:
            return flags
        if inside[0] == (0, len(part)):
            return ~flags
        ends = np.cumsum(self._tokenizer.token_bytes()[ids])
        is_exact = len(ids) > 0 and int(ends[-1]) == len(part.encode())
        for start, stop in inside:
            if is_exact:
                first = int(np.searchsorted(ends, len(part[:start].encode()), side="right"))
                last = int(np.searchsorted(ends, len(part[:stop].encode()), side="left"))
            else:  # a normaliser changed the text: the tokens that the text before has as well are before the span
                first = _common(ids, self._tokenizer.encode(part[:start]))
                last = _common(ids, self._tokenizer.encode(part[:stop])) - 1
            flags[first : last + 1] = stop > start
        return flags

    def _ask(self, chat: dict[str, Any]) -> dict[str, Any]:
        """One chat's answer from the process, started at the first call."""
        if self._process is None:
            self._start()
        answer = self._exchange(chat)
        if answer is None:
            why, is_timeout = self._end()
            raise (ChatTimeout if is_timeout else ChatError)(f"the chat template {why} on these messages")
        return answer

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_SCRIPT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            start_new_session=True,  # Ctrl-C is for this process, which may still answer open requests
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )  # fmt: skip
        prose = ("content", *REASONING)
        answer = self._exchange({"source": self.source, "special": self._longest_first, "roles": ROLES, "prose": prose})
        if answer is None or answer["error"] is not None:
            why = f"it {self._end()[0]}" if answer is None else printable(str(answer["error"]), most=300)
            self.close()
            raise DataError(
                f"the chat template {printable(self.place)} is not valid: {why}. Correct it, or name another."
            )

    def _end(self) -> tuple[str, bool]:
        """Why the process has ended, for messages, and whether it took too long. The next chat starts another one."""
        assert self._process is not None
        status = self._process.wait()
        self.close()
        if status == -signal.SIGALRM:
            return "takes longer than 10 seconds", True
        return f"ended its process (status {status})", False

    def _exchange(self, message: Any) -> dict[str, Any] | None:
        """Send a message and read the answer; None if the process ended instead."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        content = json.dumps(message).encode()
        try:
            self._process.stdin.write(len(content).to_bytes(8, "little") + content)
            self._process.stdin.flush()
            size = self._process.stdout.read(8)
            answer = self._process.stdout.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
        except BrokenPipeError:
            return None
        return json.loads(answer) if answer else None


@dataclass(frozen=True)
class Encoded:
    """A chat as tokens."""

    ids: np.ndarray
    """int64 [tokens]"""
    learned: np.ndarray
    """bool [tokens]: written by the assistant."""


def open_template(place: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A built-in template by its name, or the one in a file. DataError if it cannot be read."""
    if place in CHAT_TEMPLATES:
        source = (_FOLDER / f"{place}.jinja").read_text()
        return ChatTemplate(source, tokenizer, place=place, stop_strings=_STOPS.get(place, ()))
    return ChatTemplate(template_source(place), tokenizer, place=place)


def template_source(place: str) -> str:
    """The text of a template. DataError if it cannot be read."""
    path = _FOLDER / f"{place}.jinja" if place in CHAT_TEMPLATES else Path(place)
    try:
        return read_bounded_text(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the chat template {printable(place)} cannot be read: {printable(str(error))}. Name a Jinja file, or one of "
            f"{', '.join(CHAT_TEMPLATES)}."
        ) from error


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message with its thinking under the names that templates read, as transformers fills them in."""
    thinking = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return dict(message) if thinking is None else {"thinking": thinking, **message, "reasoning_content": thinking}


def _texts_in(value: Any) -> Iterator[str]:
    """All texts that an author wrote, at any depth, keys included; not the names of roles and of a message's usual fields."""
    waiting = [value]  # not recursive: a record may be nested deeper than Python's calls
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case Mapping() as fields:
                yield from (str(key) for key in fields if key not in _FIELDS)
                waiting += (inner for key, inner in fields.items() if key != "role" or inner not in ROLES)
            case list() | tuple() as inner:
                waiting += inner


def _common(ids: np.ndarray, other: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    size = min(len(ids), len(other))
    differ = np.flatnonzero(ids[:size] != np.asarray(other[:size], dtype=np.int64))
    return int(differ[0]) if len(differ) else size
