"""Writes `data/corpora/small_chats.jsonl.gz`, small instructions with their answers: `python tests/small_chats.py FILE`.

Each kind of instruction is a rule that a model of a few million parameters can learn in minutes: saying a word again, once or
twice, choosing among three by place, writing something in brackets, sums of digits (every sum occurs, in several wordings). One
chat in five goes on for a second turn. All of it is drawn from one seed.
"""

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

COUNT = 12_000
_WORDS = """
king queen sword crown night day heart hand love death blood ghost honour castle field ship storm sea moon star fire water stone
tree rose bird horse dog lion brother sister father mother friend enemy soldier letter ring door house town road grave heaven
earth world time year hour morning summer winter wind rain light shadow dream sleep tongue eye face head voice music word name
truth lie fool wise young old good bad strong weak sweet bitter noble gentle cruel kind bold proud
"""
_DIGITS = "zero one two three four five six seven eight nine"
WORDS, DIGITS = _WORDS.split(), _DIGITS.split()


def _say(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(WORDS)
    return draw.choice([f"Say {word}.", f"Please say {word}.", f"Say the word {word}."]), word


def _twice(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(WORDS)
    return draw.choice([f"Say {word} twice.", f"Say the word {word} twice."]), f"{word} {word}"


def _choose(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, 3)
    place = draw.randrange(3)
    name = ("first", "second", "last")[place]
    return draw.choice([f"Which is {name}: {', '.join(words)}?", f"Give me the {name} of {', '.join(words)}."]), words[
        place
    ]


def _brackets(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(WORDS)
    return draw.choice([f"Write {word} in brackets.", f"Put {word} in brackets."]), f"({word})"


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(10), draw.randrange(10)
    first, second = draw.choice([(str(a), str(b)), (DIGITS[a], DIGITS[b])])
    wording = draw.choice(
        ["What is {} plus {}?", "Add {} and {}.", "How much is {} and {}?", "Give me the sum of {} and {}."]
    )
    return wording.format(first, second), str(a + b)


KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_say, _twice, _choose, _brackets, _sum)


def chats() -> list[list[dict[str, str]]]:
    """The messages of every chat."""
    draw = random.Random(19)
    found = []
    for _ in range(COUNT):
        messages = []
        for _ in range(2 if draw.random() < 0.2 else 1):
            question, answer = draw.choice(KINDS)(draw)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found.append(messages)
    return found


def content() -> bytes:
    """The file, before it is compressed."""
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in chats()).encode()


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(gzip.compress(content(), mtime=0))
