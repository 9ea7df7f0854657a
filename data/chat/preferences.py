"""From one record of preferences to a checked context with ranked answers. Four forms of records are read:

    {"chosen": [messages], "rejected": [messages]}                         whole conversations with a common beginning
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}   (TRL)
    {"prompt": "text", "chosen": "text", "rejected": "text"}
    {"context": [messages], "completions": [{"rank": 0, "completion": [messages]}, ...]}       (NeMo-RL; lower is better)

    record --preference_of--> Preference(context, answers), best first --pairs--> (better, worse) of different ranks
           --preference_text_of--> '{"context": [...], "answers": [{"rank": 0, "messages": [...]}, ...], "tools": [...]}'

The text passes through the same reading, sizes and held-out split as a chat's. A record that is not a preference is a ValueError
that says why, as in `data.chat.record`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from data.chat.record import as_line, check_order, checked_messages, without_nulls
from recipes.schema.data import SourceConfig
from recipes.schema.foreign import parse_json

Messages = list[dict[str, Any]]
FIELDS = ("prompt", "chosen", "rejected", "context", "completions")
"""Fields of the four forms of records."""
MOST_ANSWERS = (1 << 15) - 1
"""Ranks are stored as int16."""


@dataclass(frozen=True)
class RankedAnswer:
    """An answer, which may be several messages (tool calls and their results), and its rank."""

    rank: int
    """Lower is better; equal ranks are equally good."""
    messages: Messages


@dataclass(frozen=True)
class Preference:
    """A conversation up to the last message of the user (or a tool), and at least two answers of different ranks."""

    context: Messages
    answers: tuple[RankedAnswer, ...]
    """Best first; equal ranks in the record's order."""

    def pairs(self) -> Iterator[tuple[RankedAnswer, RankedAnswer]]:
        """All (better, worse) pairs; answers of equal rank form none."""
        for better, worse in combinations(self.answers, 2):
            if better.rank < worse.rank:
                yield better, worse


def pair_count(ranks: Sequence[int]) -> int:
    """Number of pairs of answers of different ranks."""
    same = sum(count * (count - 1) // 2 for count in Counter(ranks).values())
    return len(ranks) * (len(ranks) - 1) // 2 - same


def preference_text_of(source: SourceConfig, *, is_table: bool) -> Callable[[Any], str]:
    """A function from a record to its preference as a line of JSON: ranks count from 0 without gaps, best first. It raises
    ValueError with the reason. is_table: as for `data.chat.record.chat_of`."""
    return lambda record: _text(without_nulls(record) if is_table else record, source)


def _text(record: Any, source: SourceConfig) -> str:
    preference = preference_of(record)
    ranks = {rank: place for place, rank in enumerate(sorted({answer.rank for answer in preference.answers}))}
    answers = [{"rank": ranks[answer.rank], "messages": answer.messages} for answer in preference.answers]
    return as_line({"context": preference.context, "answers": answers}, record, tools_field=source.tools_field)


def preference_of(record: Any) -> Preference:
    """The preference in a record of one of the four forms. ValueError says what is wrong, and where."""
    if not isinstance(record, Mapping):
        raise ValueError(f"is a {type(record).__name__}, not a record of a preference")
    if "completions" in record:
        return _ranked(record)
    if "chosen" not in record or "rejected" not in record:
        raise ValueError(
            f"has no chosen and rejected, and no context with completions (it has: {', '.join(map(str, record)) or 'nothing'})"
        )
    chosen, rejected = (_messages(record[name], name) for name in ("chosen", "rejected"))
    if "prompt" in record:
        context = _messages(record["prompt"], "prompt", role="user")
    else:
        common = 0
        while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
            common += 1
        if common == len(chosen) == len(rejected):
            raise ValueError("has a chosen answer that equals the rejected one: nothing is preferred")
        # What both say first is the context, but never an answer by itself: an answer starts after a user or a tool.
        while common and chosen[common - 1]["role"] == "assistant":
            common -= 1
        context, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    return _checked(context, [RankedAnswer(0, chosen), RankedAnswer(1, rejected)], names=("chosen", "rejected"))


def _ranked(record: Mapping[str, Any]) -> Preference:
    context, completions = _messages(record.get("context"), "context", role="user"), record["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError("has completions that are not a list of at least two")
    if len(completions) > MOST_ANSWERS:
        raise ValueError(f"has {len(completions):,} completions, more than {MOST_ANSWERS:,}")
    answers = []
    for place, entry in enumerate(completions, start=1):
        rank = entry.get("rank") if isinstance(entry, Mapping) else None
        if type(rank) is not int:
            raise ValueError(f"completion {place} has the rank {rank!r}, not a whole number")
        answers.append(RankedAnswer(rank, _messages(entry.get("completion"), f"completion {place}")))
    if len({answer.rank for answer in answers}) < 2:
        raise ValueError("has completions of one rank only: nothing is preferred")
    return _checked(context, answers, names=[f"completion {place}" for place in range(1, len(answers) + 1)])


def _messages(value: Any, name: str, *, role: str = "assistant") -> Messages:
    """Messages of a field; a text is one message of `role`, if it is not a list of messages that is written as JSON."""
    try:
        return checked_messages(
            _written_messages(value) or [{"role": role, "content": value}] if isinstance(value, str) else value
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _written_messages(text: str) -> Any:
    """The list of messages that a text is, as tables of other tools write it; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return value if value and all(isinstance(message, dict) and "role" in message for message in value) else None


def _checked(context: Messages, answers: list[RankedAnswer], *, names: Any) -> Preference:
    """The preference, if context and answers can follow each other and the answers differ."""
    if not context:
        raise ValueError("has no context: the conversations differ from their first message on")
    for name, answer in zip(names, answers, strict=True):
        if not answer.messages:
            raise ValueError(f"{name}: no answer is left after the common beginning")
        try:
            check_order([*context, *answer.messages])
        except ValueError as error:
            raise ValueError(f"{name}, after the context: {error}") from error
        if answer.messages[0]["role"] != "assistant":
            raise ValueError(f"{name} starts with a message by {answer.messages[0]['role']}, not by assistant")
    first: dict[str, tuple[str, int]] = {}  # an answer as text: the name and rank of the first such answer
    for name, answer in zip(names, answers, strict=True):
        other, rank = first.setdefault(_identity(answer.messages), (name, answer.rank))
        if rank != answer.rank:
            raise ValueError(f"has {other} equal to {name}: nothing is preferred")
    return Preference(context, tuple(sorted(answers, key=lambda answer: answer.rank)))


def _identity(messages: Messages) -> str:
    try:
        return json.dumps(messages, sort_keys=True, default=repr)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
