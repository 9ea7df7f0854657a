"""Records that are chats, and those that are not: one clear reason each."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import small_chats
from chats import PLAIN, SYSTEM, TURNS, assistant, user

from data.chat.record import chat_of
from recipes.schema.data import SourceConfig

SOURCE = SourceConfig(path="chats.jsonl", kind="chat")
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"role": "tool", "content": "3"}


def messages_of(messages: Any, *, is_table: bool = False, **more: Any) -> Any:
    return json.loads(chat_of(SOURCE, is_table=is_table)({"messages": messages, **more}))


@pytest.mark.parametrize(
    "messages",
    [PLAIN, TURNS, SYSTEM, [user("a"), assistant("", tool_calls=[CALL]), TOOL, TOOL, assistant("b")]],
)
def test_a_chat_passes_as_it_is(messages: list[Any]) -> None:
    assert messages_of(messages)["messages"] == messages
    assert messages_of(json.dumps(messages), other=1)["messages"] == messages  # as JSON in a column
    assert messages_of(messages, tools=[{"name": "add"}])["tools"] == [{"name": "add"}]


def test_parts_of_text_are_joined_and_a_tables_nulls_are_left_out() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
    assert messages_of([user("What is it?"), assistant("x")]) == messages_of(
        [{"role": "user", "content": parts}, assistant("x")]
    )
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    chat = [
        {"role": "user", "content": "x", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert messages_of(chat, is_table=True)["messages"] == [user("x"), assistant("", tool_calls=[CALL])]
    assert messages_of(chat)["messages"][1]["tool_calls"] == [call]  # null in JSON is a value


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (None, "has no messages under 'messages'"),
        ([], "has no messages under 'messages'"),
        ("[", "not JSON"),
        (["hello"], "message 1 is a str"),
        ([user("a")], "has no answer"),
        ([user("a"), assistant("b"), user("c")], "ends with a message by user"),
        ([assistant("b")], "message 1 is by assistant, after nothing: roles are out of order"),
        ([user("a"), user("b"), assistant("c")], "message 2 is by user, after user: roles are out of order"),
        ([user("a"), assistant("b"), assistant("c")], "message 3 is by assistant, after assistant"),
        ([user("a"), {"role": "system", "content": "b"}, assistant("c")], "belongs at the beginning"),
        ([user("a"), assistant("b"), TOOL, assistant("c")], "message 3 is by tool, after an answer that called none"),
        ([user("a"), assistant(" \n")], "message 2 is an empty answer"),
        ([user("a"), {"role": "bot", "content": "b"}], "message 2 has the role 'bot'"),
        ([{"role": "user", "content": 3}, assistant("b")], "message 1 has int as content"),
        ([{"role": "user", "content": [{"type": "image"}]}, assistant("b")], "message 1 has parts that are not text"),
        ([user("a"), assistant("b", tool_calls=["add"])], "message 2 has tool_calls that are not"),
        ([user("a"), assistant("b", thinking=3)], "message 2 has thinking that is not text"),
    ],
)
def test_a_record_that_is_not_a_chat_says_why(messages: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        messages_of(messages)


def test_the_small_chats_that_are_shipped_are_what_their_program_makes() -> None:
    shipped = gzip.decompress(Path("data/corpora/small_chats.jsonl.gz").read_bytes())
    assert shipped == small_chats.content()
    for line in shipped.splitlines()[:500]:
        chat_of(SOURCE, is_table=False)(json.loads(line))
