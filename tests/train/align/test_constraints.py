"""Every kind of constraint on texts that keep it and texts that break it, judged by eye; and wrong constraints."""

from typing import Any

import pytest

from recipes.schema.errors import DataError
from train.align.verify.constraints import CONSTRAINTS, check_constraint, holds, open_constraints, sentences_of
from train.align.verify.sample import Sample

KEPT_AND_BROKEN: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("words", {"least": 2, "most": 3}, ["one two", "It's 2, ok!", "naïve über Maß"], ["one", "a b c d", "-- !"]),
    ("sentences", {"least": 2, "most": 2}, ["One. Two!", "Is it? Yes", "Wait... Now."], ["One.", "A. B. C."]),
    ("paragraphs", {"least": 2}, ["a\n\nb", "a\n \n\nb"], ["a\nb", "a\n\n"]),
    ("lines", {"most": 2}, ["a", "a\n\nb\n"], ["a\nb\nc"]),
    ("characters", {"most": 5}, ["12345 ", "abc"], ["123456"]),
    ("sentence_words", {"most": 3}, ["One two three. Four.", "A b"], ["One two three four."]),
    (
        "keywords",
        {"words": ["red fox", "sun"]},
        ["The RED fox and the sun."],
        ["The red foxes, the sun.", "red fox sunny"],
    ),
    ("forbidden_words", {"words": ["bad"]}, ["badly done", "good"], ["a Bad thing", "bad"]),
    ("keyword_count", {"word": "no", "least": 2, "most": 2}, ["No, no."], ["no", "no no no", "not no"]),
    ("letter_count", {"letter": "e", "least": 3}, ["EeE", "tree e"], ["e e"]),
    ("paragraph_first_word", {"paragraph": 2, "word": "then"}, ["a\n\nThen b"], ["then\n\nb", "a"]),
    ("unique_words", {}, ["one two Three"], ["one two One"]),
    ("unique_sentences", {}, ["A. B."], ["A. B. a."]),
    ("placeholders", {"least": 2}, ["Dear [name], [date]"], ["[name]", "[] []"]),
    ("postscript", {}, ["text\nP.S. more"], ["P.S. more", "text P.S. more", "text\nP.S."]),
    ("bullets", {"least": 2, "most": 2}, ["* a\n- b"], ["* a", "*a*\n*b*", "- a\n- b\n- c"]),
    ("numbered_items", {"least": 2}, ["1. a\n2) b"], ["1. a", "1a\n2b"]),
    ("highlights", {"least": 2}, ["*a* and **b c**"], ["*a*", "* * * *"]),
    ("headings", {"least": 1}, ["# T\ntext"], ["#tag", "text"]),
    (
        "sections",
        {"marker": "Section", "least": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1", "section 1\nsection 2"],
    ),
    ("title", {}, ["<<A title>>\ntext"], ["<A title>", "<< >>"]),
    ("code_block", {}, ["```py\nx\n```"], ["```py x", "`x`"]),
    ("table", {}, ["| a | b |\n|---|:-:|\n| 1 | 2 |"], ["| a | b |", "a b"]),
    ("two_answers", {}, ["one\n******\ntwo"], ["one", "one ****** one", "a ****** b ****** c"]),
    ("json", {}, ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "3"], ["{a: 1}", "text"]),
    ("choice", {"options": ["yes", "no"]}, [" yes\n"], ["Yes", "yes no"]),
    ("starts_with", {"phrase": "Sure"}, [" sure, go"], ["I am sure"]),
    ("ends_with", {"phrase": "the end."}, ["It is The End.", '"This is the end."'], ["the end. Or not"]),
    ("quoted", {}, ['"a"'], ['"a', "a", '"']),
    ("capital_words", {"least": 1, "most": 2}, ["a NATO ship", "I saw NATO"], ["a b", "A B C"]),
    ("uppercase", {}, ["ALL OF 1"], ["Not all", "123"]),
    ("lowercase", {}, ["all of 1"], ["Not all", "123"]),
    ("title_case", {}, ["All Of It, 2 Times"], ["All of It", "12"]),
    ("no_commas", {}, ["a b"], ["a, b", "a，b"]),
    ("no_digits", {}, ["one"], ["1", "x²"]),
    ("ascii", {}, ["plain"], ["naïve"]),
]


def test_at_least_25_kinds_are_all_tried() -> None:
    assert {kind for kind, *_ in KEPT_AND_BROKEN} == set(CONSTRAINTS) and len(CONSTRAINTS) >= 25


@pytest.mark.parametrize(("kind", "fields", "kept", "broken"), KEPT_AND_BROKEN)
def test_each_kind_holds_where_it_should(kind: str, fields: dict[str, Any], kept: list[str], broken: list[str]) -> None:
    for text in kept:
        assert holds({"kind": kind, **fields}, text), text
    for text in [*broken, "", " \n"]:
        assert not holds({"kind": kind, **fields}, text), text


def test_sentences() -> None:
    assert sentences_of("Hello! Is it 5? Yes") == ["Hello!", "Is it 5?", "Yes"]
    assert sentences_of("Wait... ok. ... ?!") == ["Wait...", "ok."]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("words", "a constraint is str, not a mapping with a `kind`"),
        ({"kind": "wrds"}, "Did you mean words?"),
        ({"kind": "words"}, "constraint words needs least, most or both"),
        ({"kind": "words", "least": "3"}, "least='3' is not a whole number from 0 on"),
        ({"kind": "words", "least": True}, "least=True is not a whole number"),
        ({"kind": "words", "leest": 3}, "unknown parameter leest. It takes least, most."),
        ({"kind": "json", "least": 3}, "unknown parameter least. It takes none."),
        ({"kind": "keywords", "words": []}, "words=[] is not a list of texts"),
        ({"kind": "keyword_count", "least": 1}, "constraint keyword_count needs word"),
    ],
)
def test_a_wrong_constraint_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        check_constraint(wrong)
    assert message in str(raised.value)


def test_the_reward_is_the_share_that_holds_or_all_of_them() -> None:
    listed = [{"kind": "no_commas"}, {"kind": "words", "least": 3}, {"kind": "lowercase"}, {"kind": "ascii"}]
    judge = open_constraints()
    assert judge(Sample("", "Two words", {"constraints": listed})) == 0.5
    assert judge(Sample("", "Two words", {"constraints": listed, "all": True})) == 0.0
    assert judge(Sample("", "just three words", {"constraints": listed, "all": True})) == 1.0
    for facts, message in (({}, "'constraints' is NoneType, not list"), ({"constraints": []}, "has no constraints")):
        with pytest.raises(DataError, match=message):
            judge(Sample("", "a", facts))
