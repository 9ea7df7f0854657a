"""The thinking budget (arXiv 2508.14444, section 3.4): the end marker comes at the next line break after `budget` tokens, at the
latest after `budget + grace` tokens."""

import pytest

from train.inference.request import Thinking
from train.inference.thinking import ThinkingWatch

START, END, LINE = (90, 91), (95, 96), 10


def written(free: list[int], *, prompt: list[int], budget: int, grace: int = 500) -> list[int]:
    """The output if the model would write the tokens `free`."""
    watch, out = ThinkingWatch(Thinking(budget, START, END, frozenset({LINE}), grace), prompt), []
    wishes = iter(free)
    while True:
        token = watch.forced
        if token is None:
            token = next(wishes, None)
        if token is None:
            return out
        watch.see(token)
        out.append(token)


def test_the_marker_comes_at_the_next_line_break() -> None:
    assert written([1, LINE, 2, 3, LINE, 4], prompt=[5, *START], budget=3) == [1, LINE, 2, 3, LINE, *END, 4]


def test_the_marker_comes_after_the_grace_without_a_line_break() -> None:
    assert written([1] * 9, prompt=[5, *START], budget=3, grace=4) == [1] * 7 + [*END, 1, 1]


def test_a_default_grace_of_500_tokens() -> None:
    out = written([1] * 600, prompt=list(START), budget=10)
    assert out.index(END[0]) == 510


@pytest.mark.parametrize("prompt", [[5], [5, *START, 1, *END], [*START, *END, 2]])
def test_outside_of_thinking_nothing_is_forced(prompt: list[int]) -> None:
    assert written([1, LINE] * 20, prompt=prompt, budget=0) == [1, LINE] * 20


def test_thinking_that_the_model_starts_and_ends_itself_is_left_alone() -> None:
    free = [1, *START, 2, LINE, *END, 3, LINE, 4]
    assert written(free, prompt=[5], budget=4) == free


def test_the_budget_holds_for_thinking_that_starts_later() -> None:
    assert written([1, *START, 2, 3, LINE, 4], prompt=[5], budget=2) == [1, *START, 2, 3, LINE, *END, 4]


def test_no_budget_ends_thinking_at_once() -> None:
    assert written([1, 2], prompt=[5, *START], budget=0) == [*END, 1, 2]
