"""What is done to an answer's thinking before it is learned: stripped, cut short, or left out of later turns.

    chat --(seed, chat) decide--> chat(s) to learn from, each with the answers that are learned

Thinking is a field of the message (`reasoning_content`) or stands between markers at the beginning of its content; it stays
where it was. Nemotron Nano 2 strips it from about 10 % of the prompts and cuts it to 1,000 to 2,000 tokens with the answer kept
(arXiv 2508.14444, section 3); Nemotron 3 makes a new sequence of each user turn, without the thinking of earlier turns.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.chat.record import REASONING
from recipes.schema.data import ChatConfig


@dataclass(frozen=True)
class Lesson:
    """A chat to learn from."""

    messages: list[dict[str, Any]]
    learned: frozenset[int]
    """Places of the messages that are learned, all by the assistant."""


def lessons(
    messages: Sequence[Mapping[str, Any]], config: ChatConfig, *, key: bytes, cut: Callable[[str, int], str]
) -> list[Lesson]:
    """The chats to learn from that one record becomes. key: decides what is done (`key_of`). cut(text, n): its first n tokens."""
    strip, shorten, length = _uniform(key)
    most = config.cut_thinking_min + int(length * (config.cut_thinking_max - config.cut_thinking_min + 1))

    def changed(thinking: str) -> str:
        if strip < config.strip_thinking_fraction:
            return ""
        return cut(thinking, most) if shorten < config.cut_thinking_fraction else thinking

    chat = [_with_thinking(message, changed, config) for message in messages]
    answers = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    turns = [place for place, message in enumerate(chat) if message["role"] == "user"]
    thought = [place for place in answers if split_thinking(chat[place], config)[0]]
    if config.earlier_thinking == "keep" or not any(place < turns[-1] for place in thought):
        return [Lesson(chat, frozenset(answers))]
    found = []
    for turn, after in zip(turns, [*turns[1:], len(chat)], strict=True):
        before = [_with_thinking(message, lambda _: "", config, is_earlier=True) for message in chat[:turn]]
        found.append(Lesson(before + chat[turn:after], frozenset(place for place in answers if turn < place < after)))
    return found


def key_of(text: str, *, seed: int) -> bytes:
    """What decides about a record: a function of the seed and the record's content, wherever it is stored."""
    return hashlib.blake2b(
        text.encode(), digest_size=24, key=b"thinking" + seed.to_bytes(8, "little", signed=True)
    ).digest()


def split_thinking(message: Mapping[str, Any], config: ChatConfig) -> tuple[str, str]:
    """(thinking, answer) of an answer; the thinking is empty if it has none."""
    for name in REASONING:
        if message.get(name):
            return str(message[name]), message["content"]
    return _split(message["content"], config)


def has_answer(message: Mapping[str, Any], config: ChatConfig) -> bool:
    """Whether a message by the assistant says or calls anything besides thinking, however often it thinks."""
    rest = str(message["content"]).strip()
    while rest.startswith(config.think_start) and config.think_end in rest:
        rest = rest.partition(config.think_end)[2].strip()
    return bool(rest or message.get("tool_calls"))


def _with_thinking(
    message: Mapping[str, Any], change: Callable[[str], str], config: ChatConfig, *, is_earlier: bool = False
) -> dict[str, Any]:
    """An answer with its thinking changed; other messages as they are. Where nothing is left, its markers go too."""
    result = dict(message)
    if message["role"] != "assistant" or not split_thinking(message, config)[0]:
        return result
    empty = "" if is_earlier else config.stripped_thinking
    names = [name for name in REASONING if message.get(name)]
    if names:
        thinking = change(str(message[names[0]]))
        for name in names:
            result.pop(name)
        if thinking:
            result[names[0]] = thinking
        else:
            result["content"] = empty + message["content"]
        return result
    thinking, answer = _split(message["content"], config)
    kept = change(thinking)
    if kept != thinking:
        result["content"] = message["content"].replace(thinking, kept, 1) if kept else empty + answer
    return result


def _split(content: str, config: ChatConfig) -> tuple[str, str]:
    """(thinking, answer) of a content that begins with thinking between the markers; thinking is empty if it does not."""
    rest = content.lstrip()
    if not rest.startswith(config.think_start) or config.think_end not in rest:
        return "", content
    thinking, _, answer = rest.removeprefix(config.think_start).partition(config.think_end)
    return (thinking, answer.lstrip()) if thinking.strip() else ("", content)


def _uniform(key: bytes) -> tuple[float, float, float]:
    """Three numbers in [0, 1)."""
    a, b, c = (int.from_bytes(key[at : at + 8], "little") / 2**64 for at in (0, 8, 16))
    return a, b, c
