"""Records of preferences in each of their forms, and what is wrong with those that are none."""

from typing import Any

import pytest

from data.chat.preferences import preference_of

ASKED = {"role": "user", "content": "2 + 2?"}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


RECORDS: list[dict[str, Any]] = [
    {"chosen": [ASKED, said("4")], "rejected": [ASKED, said("5")]},
    {"prompt": [ASKED], "chosen": [said("4")], "rejected": [said("5")]},
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"context": [ASKED], "completions": [
        {"rank": 1, "completion": [said("5")]}, {"rank": 0, "completion": [said("4")]},
    ]},
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_every_form_gives_the_same_preference(record: dict[str, Any]) -> None:
    found = preference_of(record)
    assert found.context == [ASKED]
    assert [(a.rank, a.messages) for a in found.answers] == [(0, [said("4")]), (1, [said("5")])]
    assert [(a.messages, b.messages) for a, b in found.pairs()] == [([said("4")], [said("5")])]


def test_rankings_have_all_pairs_of_different_ranks() -> None:
    completions = [{"rank": rank, "completion": text} for rank, text in ((2, "c"), (0, "a"), (2, "d"), (1, "b"))]
    found = preference_of({"context": "go", "completions": completions})
    pairs = [(better.messages[0]["content"], worse.messages[0]["content"]) for better, worse in found.pairs()]
    assert pairs == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]


def test_an_answer_that_begins_alike_stays_whole() -> None:
    """The first answer's first message is the same: it belongs to the answers, not to the context."""
    more = {"role": "user", "content": "sure?"}
    found = preference_of({
        "chosen": [ASKED, said("4"), more, said("yes")], "rejected": [ASKED, said("4"), more, said("no")],
    })  # fmt: skip
    assert found.context == [ASKED, said("4"), more]
    shorter = preference_of({"chosen": [ASKED, said("4")], "rejected": [ASKED, said("4"), more, said("no")]})
    assert shorter.context == [ASKED] and len(shorter.answers[1].messages) == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "is a str, not a record of a preference"),
        ({"chosen": [ASKED, said("4")]}, "has no chosen and rejected"),
        ({"prompt": "2?", "chosen": "4", "rejected": "4"}, "has chosen equal to rejected"),
        ({"chosen": [ASKED, said("4")], "rejected": [ASKED, said("4")]}, "chosen answer that equals the rejected"),
        ({"prompt": "2?", "chosen": " ", "rejected": "4"}, "chosen: message 1 is an empty answer"),
        ({"prompt": "2?", "chosen": [ASKED], "rejected": "4"}, "chosen, after the context: message 2 is by user"),
        ({"prompt": [said("a")], "chosen": "4", "rejected": "5"}, "after the context: message 1 is by assistant"),
        ({"chosen": [ASKED, said("4")], "rejected": [said("5")]}, "has no context"),
        ({"context": "2?", "completions": [{"rank": 0, "completion": "4"}]}, "at least two"),
        ({"context": "2?", "completions": [{"rank": "0", "completion": "4"}] * 2}, "completion 1 has the rank '0'"),
        ({"context": "2?", "completions": [{"rank": 0, "completion": "4"}] * 2}, "of one rank only"),
        (
            {"context": "2?", "completions": [{"rank": 0, "completion": "4"}, {"rank": 1, "completion": "4"}]},
            "has completion 1 equal to completion 2",
        ),
    ],
)
def test_what_is_no_preference_is_refused_with_the_reason(record: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        preference_of(record)
    assert message in str(raised.value)
