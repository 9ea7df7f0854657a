"""From one record of a data set to a checked chat, as text: one line of JSON with messages and tools.

    {"messages": [{"role", "content", ...}], "tools": [...]} --chat_of--> '{"messages": [...], "tools": [...]}'

As text it passes through the same reading, sizes and held-out split as any document. A record that is not a chat is a
ValueError that says which message is wrong.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from recipes.schema.data import SourceConfig
from recipes.schema.foreign import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
_BEFORE = {
    "user": ("", "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""By role: the roles of the message before it; empty: it may come first."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which data sets give an answer's thinking."""


def chat_of(source: SourceConfig, *, is_table: bool) -> Callable[[Any], str]:
    """A function from a record to its chat as a line of JSON. It raises ValueError with the reason.

    is_table: a table's records have every field that any record has, null where it was absent: null is no value there.
    """
    return lambda record: _chat(without_nulls(record) if is_table else record, source)


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """Messages that someone wrote by hand, in any order of roles. ValueError names the one that is not a message."""
    if not isinstance(value, list):
        raise ValueError("has messages that are not a list")
    if not value:
        raise ValueError("has an empty list of messages")
    return [_message(message, place) for place, message in enumerate(value, start=1)]


def words_of(chat: str) -> str:
    """What the messages of a chat or a preference say, for training a tokenizer. chat: as `chat_of` gives it, or
    `data.chat.preferences`."""
    record = json.loads(chat)
    messages = record["messages"] if "messages" in record else list(record["context"])
    for answer in record.get("answers", ()):
        messages += answer["messages"]
    return "\n".join(message["content"] for message in messages)


def _chat(record: Any, source: SourceConfig) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(f"is a {type(record).__name__}, not a record with {source.messages_field!r}")
    messages = _parsed(record.get(source.messages_field), source.messages_field)
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"has no messages under {source.messages_field!r} (it has: {', '.join(map(str, record))}). Set "
            f"messages_field of this source"
        )
    chat: dict[str, Any] = {"messages": [_message(message, place) for place, message in enumerate(messages, start=1)]}
    check_order(chat["messages"])
    return as_line(chat, record, tools_field=source.tools_field)


def as_line(chat: dict[str, Any], record: Mapping[str, Any], *, tools_field: str) -> str:
    """A checked chat or preference, with the tools of its record, as a line of JSON. ValueError says what JSON does not have."""
    tools = _parsed(record.get(tools_field), tools_field)
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"has tools under {tools_field!r} that are not a list of objects")
        chat["tools"] = tools
    try:
        return json.dumps(chat, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"has a value that JSON does not have: {error}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def without_nulls(value: Any) -> Any:
    """A record of a table, without the fields that it does not have."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parsed(value: Any, name: str) -> Any:
    """A list, or one that is written as JSON, as tables of other tools do."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"has text under {name!r} that is not JSON: {error}") from error


def _message(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {place} is a {type(message).__name__}, not an object with role and content")
    kept = {str(name): value for name, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in ROLES:
        raise ValueError(f"message {place} has the role {role!r}; known are {', '.join(ROLES)}")
    kept["content"] = _content(kept.get("content", ""), place)
    for name in REASONING:
        if name in kept and not isinstance(kept[name], str):
            raise ValueError(f"message {place} has {name} that is not text")
    calls = kept.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(_is_call(call) for call in calls)):
        raise ValueError(f"message {place} has tool_calls that are not a list of functions with name and arguments")
    if not calls:
        kept.pop("tool_calls", None)
    if role == "assistant" and not calls and not kept["content"].strip():
        raise ValueError(f"message {place} is an empty answer")
    return kept


def _content(content: Any, place: int) -> str:
    """The text of a message; a list of parts is joined if all are text."""
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        raise ValueError(f"message {place} has parts that are not text")
    if not isinstance(content, str):
        raise ValueError(f"message {place} has {type(content).__name__} as content, not text")
    return content


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str) and "arguments" in function


def check_order(messages: list[dict[str, Any]]) -> None:
    """Who may follow whom. ValueError names the first message out of order."""
    before, has_calls = "", False
    for place, message in enumerate(messages, start=1):
        role = message["role"]
        if role in ("system", "developer"):
            if before not in ("", "system", "developer"):
                raise ValueError(f"message {place} is by {role}, after {before}: it belongs at the beginning")
        elif before not in _BEFORE[role]:
            raise ValueError(f"message {place} is by {role}, after {before or 'nothing'}: roles are out of order")
        elif role == "tool" and before == "assistant" and not has_calls:
            raise ValueError(f"message {place} is by tool, after an answer that called none")
        has_calls = bool(message.get("tool_calls"))
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no answer: no message is by assistant")
    if before != "assistant":
        raise ValueError(f"ends with a message by {before}: nothing answers it")
