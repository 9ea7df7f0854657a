"""Applies the thinking budget of one text (rule: `Thinking`): reads its tokens and forces the next one when required."""

from collections import deque
from collections.abc import Sequence

from train.inference.request import Thinking


class ThinkingWatch:
    """The state of one text's budget. Call `see` with every token; `forced` is the token that must come next, if any."""

    def __init__(self, rule: Thinking, prompt: Sequence[int]) -> None:
        self.rule = rule
        self.text = list(prompt)
        starts, ends = _last(prompt, rule.start), _last(prompt, rule.end)
        self.thought: int | None = len(prompt) - starts if starts > ends else None
        """Number of thinking tokens so far; None outside of thinking."""
        self._queue: deque[int] = deque()
        self._check()

    @property
    def forced(self) -> int | None:
        return self._queue[0] if self._queue else None

    def see(self, token: int) -> None:
        """The next token of the text; the forced one if there is one."""
        self.text.append(token)
        if self._queue:
            assert token == self._queue.popleft(), "a forced token was not written"
        if self.thought is None:
            if _ends_with(self.text, self.rule.start):
                self.thought = 0
                self._check()
            return
        self.thought += 1
        if _ends_with(self.text, self.rule.end):
            self.thought = None
            return
        self._check()

    def _check(self) -> None:
        if self.thought is None or self._queue:
            return
        over = self.thought - self.rule.budget
        if over >= self.rule.grace or (over >= 0 and (self.thought == 0 or self.text[-1] in self.rule.newlines)):
            self._queue.extend(self.rule.end)


def _ends_with(text: Sequence[int], marker: tuple[int, ...]) -> bool:
    return tuple(text[-len(marker) :]) == marker


def _last(text: Sequence[int], marker: tuple[int, ...]) -> int:
    """Index after the last occurrence of a marker; -1 without one."""
    size = len(marker)
    ends = range(len(text), size - 1, -1)
    return next((end for end in ends if tuple(text[end - size : end]) == marker), -1)
