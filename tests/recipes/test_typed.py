"""The typed reader: right values pass unchanged, every wrong one is named with place and remedy, all at once."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.schema.fields import Fraction, PositiveInt
from recipes.schema.typed import FieldError, build, field_docs


@dataclass(frozen=True)
class Inner:
    width: PositiveInt
    """How wide."""
    share: Fraction = 0.5
    """A share."""


@dataclass(frozen=True)
class Outer:
    name: str
    """What it is called,
    over two lines."""
    kind: Literal["wsd", "cosine"] = "wsd"
    """Which."""
    deep: dict[str, Inner] = field(default_factory=dict)
    """Groups."""
    lr: float = 0.1
    """Rate."""
    maybe: PositiveInt | None = None
    """Perhaps."""
    sizes: tuple[int, ...] = ()
    """Sizes."""
    on: bool = False
    """Switch."""


def test_right_values_pass_unchanged() -> None:
    built = build(
        Outer,
        {"name": "x", "deep": {"a": {"width": 3}}, "lr": "1e-3", "maybe": None, "sizes": [1, 2], "on": True},
        "",
    )
    assert built == Outer(name="x", deep={"a": Inner(3)}, lr=1e-3, sizes=(1, 2), on=True)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "x", "knd": "wsd"}, "top.knd is not a field. Did you mean top.kind?"),
        ({"name": "x", "kind": "cosin"}, "top.kind='cosin' is not a choice. Did you mean cosine?"),
        ({}, "top.name is missing: What it is called, over two lines."),
        ({"name": 3}, "top.name=3 is a whole number, not a text."),
        ({"name": "x", "lr": True}, "top.lr=True is a true/false, not a number."),
        ({"name": "x", "lr": "fast"}, "top.lr='fast' is a text, not a number."),
        ({"name": "x", "maybe": 0}, "top.maybe=0 is out of range. Use a value >= 1."),
        ({"name": "x", "maybe": 2.0}, "top.maybe=2.0 is a number with a fraction, not a whole number."),
        ({"name": "x", "on": "yes"}, "top.on='yes' is a text, not true or false."),
        ({"name": "x", "sizes": [1, "b"]}, "top.sizes[1]='b' is a text, not a whole number."),
        ({"name": "x", "deep": {"a": {"width": -1}}}, "top.deep.a.width=-1 is out of range. Use a value >= 1."),
        (
            {"name": "x", "deep": {"a": {"width": 1, "share": 1.5}}},
            "share=1.5 is out of range. Use a value >= 0 and <= 1.",
        ),
        ({"name": "x", "deep": 3}, "top.deep=3 is a whole number, not a group."),
    ],
)
def test_wrong_values_are_named_with_place_and_remedy(mapping: dict, message: str) -> None:
    with pytest.raises(FieldError) as caught:
        build(Outer, mapping, "top")
    assert message in str(caught.value)


def test_all_type_errors_are_reported_at_once() -> None:
    with pytest.raises(FieldError) as caught:
        build(Outer, {"nam": 1, "lr": None, "kind": 1, "deep": {"a": {}}}, "")
    assert len(str(caught.value).splitlines()) == 5


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_no_input_escapes_as_another_error(value: object) -> None:
    for mapping in ({"name": "x", "deep": value}, {"name": value}, {"name": "x", "lr": value, "sizes": value}, value):
        try:
            build(Outer, mapping, "")
        except FieldError:
            continue


def test_field_texts_are_found() -> None:
    assert field_docs(Inner) == {"width": "How wide.", "share": "A share."}
