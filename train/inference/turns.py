"""A text in the engine (`OpenText`), what it does in a step (`Turn`) and the tokens that the step gives it (`Drawn`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from train.inference.drafters import Draft
from train.inference.forward import Read
from train.inference.request import Finish, Request
from train.inference.thinking import ThinkingWatch


@dataclass(eq=False)
class OpenText:
    """A request that has not ended, and its state."""

    id: int
    request: Request
    tokens: list[int]
    """Prompt and generated tokens."""
    watch: ThinkingWatch | None
    done: int = 0
    """Number of tokens that are in the pools."""
    row: int = -1
    """Row in the pools; -1 while waiting."""
    scored: int = 0
    """Number of prompt tokens, from the start, whose scores were reported."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of the text's blocks in the prefix cache, as far as they are computed."""
    most_guesses: int = 0
    """Largest number of guesses in one step; 0: the drafter ignores the text."""
    guesses: int = 0
    """Largest number of guesses in the next step: one more than were right in the last, or `most_guesses` if all were."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Number of tokens that are not in the pools yet."""
        return len(self.tokens) - self.done

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: the first text is served first."""
        return (-self.request.priority, self.id)


@dataclass(frozen=True)
class Drawn:
    """A new token of a text."""

    text: OpenText
    id: int
    line: int
    """Of the logits that it was drawn from."""
    is_forced: bool = False
    is_guessed: bool = False
    guesses: int | None = None
    """As in `Event`."""
    finish: Finish | None = None
    """`error`: there is no token."""


@dataclass(eq=False)
class Turn:
    """What a text does in a step."""

    text: OpenText
    count: int
    """Tokens that it reads for good."""
    draft: Draft = field(default_factory=Draft)
    """Guesses that it reads too; only if `count` is all that is left."""

    @property
    def read(self) -> Read:
        text = self.text
        tokens = [*text.tokens[text.done : text.done + self.count], *self.draft.tokens]
        return Read(text.row, tokens, text.done, is_trial=bool(self.draft.tokens))

    @property
    def tokens(self) -> int:
        return self.count + len(self.draft.tokens)

    @property
    def is_drawing(self) -> bool:
        """Whether it gets a token."""
        return self.count == self.text.left and self.text.generated < self.text.request.max_new_tokens

    def accept(self, places: range, ids: Sequence[int], is_finite: list[bool]) -> list[Drawn]:
        """The tokens that the text gets, which become part of it: as long as guesses are right, and one more.

        places: lines of the logits after the last token and after each guess. ids: what was drawn from each of them; is_finite:
        whether a line is usable.
        """
        text, guesses = self.text, self.draft.tokens
        found: list[Drawn] = []
        for index, line in enumerate(places):
            if not is_finite[line]:  # after a right guess: the text ends with what was drawn before
                found.append(Drawn(text, -1, line, finish="error"))
                break
            forced = text.watch.forced if text.watch is not None else None
            id = ids[index] if forced is None else forced
            text.tokens.append(id)
            if text.watch is not None:
                text.watch.see(id)
            is_right = index < len(guesses) and guesses[index] == id
            is_last = text.generated == text.request.max_new_tokens
            finish: Finish | None = "stop" if id in text.request.stop else "length" if is_last else None
            found.append(
                Drawn(
                    text, id, line, is_forced=forced is not None, is_guessed=is_right, guesses=None if index else len(guesses),
                    finish=finish,
                )
            )  # fmt: skip
            if finish or not is_right:
                break
        if guesses:
            right = sum(one.is_guessed for one in found)
            text.guesses = text.most_guesses if right == len(guesses) else right + 1
        return found
