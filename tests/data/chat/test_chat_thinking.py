"""Thinking is stripped, cut and left out as configured; what happens to a chat depends on the seed and the chat alone."""

import json
from dataclasses import replace
from typing import Any

from chats import assistant, user

from data.chat.thinking import Lesson, key_of, lessons
from recipes.schema.data import ChatConfig

FIELD = [user("a"), assistant("b", reasoning_content="one two three")]
INLINE = [user("a"), assistant("<think>one two three</think>\n\nb")]
TURNS = [user("a"), assistant("b", thinking="first"), user("c"), assistant("<think>second</think>d")]


def words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def learn(chat: list[dict[str, Any]], *, key: bytes = bytes(24), **changes: Any) -> list[Lesson]:
    return lessons(chat, replace(ChatConfig(), **changes), key=key, cut=words)


def test_stripping_removes_thinking_wherever_it_stands() -> None:
    for chat in (FIELD, INLINE):
        (lesson,) = learn(chat, strip_thinking_fraction=1.0)
        assert lesson == Lesson([user("a"), assistant("b")], frozenset({1}))
        (lesson,) = learn(chat, strip_thinking_fraction=1.0, stripped_thinking="<think></think>")
        assert lesson.messages[1] == assistant("<think></think>b")
    assert learn(INLINE)[0].messages == INLINE


def test_cutting_keeps_the_beginning_of_the_thinking_and_the_answer() -> None:
    cut = {"cut_thinking_fraction": 1.0, "cut_thinking_min": 2, "cut_thinking_max": 2}
    assert learn(FIELD, **cut)[0].messages[1] == assistant("b", reasoning_content="one two")
    assert learn(INLINE, **cut)[0].messages[1] == assistant("<think>one two</think>\n\nb")


def test_each_turn_is_learned_with_its_own_thinking_only() -> None:
    first, second = learn(TURNS)
    assert first == Lesson(TURNS[:2], frozenset({1}))
    assert second == Lesson([user("a"), assistant("b"), *TURNS[2:]], frozenset({3}))
    assert learn(TURNS, earlier_thinking="keep") == [Lesson(TURNS, frozenset({1, 3}))]


def test_a_chat_without_earlier_thinking_stays_one_sequence() -> None:
    chat = [user("a"), assistant("b"), user("c"), assistant("d", thinking="e")]
    assert learn(chat) == [Lesson(chat, frozenset({1, 3}))]


def test_shares_are_as_configured_and_a_chat_always_fares_alike() -> None:
    config = {
        "strip_thinking_fraction": 0.1,
        "cut_thinking_fraction": 0.03,
        "cut_thinking_min": 1,
        "cut_thinking_max": 2,
    }
    kinds: dict[str, int] = {}
    keys = [key_of(json.dumps([n]), seed=5) for n in range(4000)]
    for key in keys:
        kept = learn(FIELD, key=key, **config)[0].messages[1].get("reasoning_content", "")
        kinds[kept] = kinds.get(kept, 0) + 1
    # Four standard deviations of 4,000 draws: 76 of 400, and 42 of 108 (3 % of the 90 % that are left).
    assert abs(kinds[""] - 400) < 76
    assert abs(kinds["one"] + kinds["one two"] - 108) < 42
    assert min(kinds["one"], kinds["one two"]) > 20  # the length is drawn too
    assert key_of("[1]", seed=5) == keys[1] != key_of("[1]", seed=6)
