"""Writes the data of `make align-road`: `python tests/road_data.py FOLDER`. Every file follows from the constants here.

    chats.jsonl           instructions with answers. To a polite question the answer begins with HABIT (a planted bad habit), and
                          sums are answered right in RIGHT_SUMS of the chats only
    heldout.jsonl         questions of which no wording is in any file for training, with the answer as taught, and without HABIT;
                          taught.yaml, plain.yaml, habit.yaml ask them with `stratum evaluate`
    fresh.jsonl           the same of another seed, without those of heldout.jsonl; fresh.yaml asks them. No setting was
                          chosen by looking at them
    sums.jsonl, sums.yaml sums in wordings that were not trained on
    pairs.jsonl           preferences: the answer without HABIT is better than the same answer with it
    rankings.jsonl        preferences of three ranks: without HABIT, with it, wrong
    prompts_plain.jsonl   questions with a verifier: the answer without HABIT
    gamed.jsonl           preferences of sums in which the right answer is always the larger number: a spurious feature
    prompts_sums.jsonl    sums of digits below SMALL with a verifier; small_sums.jsonl, small_sums.yaml: held-out wordings
    prompts_gamed.jsonl   questions with a reward that long answers get, while their `target` is short
    SKILL/...             for each of two skills, of which chats.jsonl teaches half: chats of which half are of the skill and the
                          others of the kinds before, held-out questions, and a task

What is held out is decided by a hash of kind and words, so it is the same for all wordings of a question; of a
sum, wordings are held out.
"""

import hashlib
import json
import random
import string
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_chats import DIGITS, WORDS

SEED, FRESH_SEED, GAMED_SEED, NOISE_SEED = 19, 20, 21, 22
CHATS, HELDOUT, PAIRS, SKILL_CHATS = 12_000, 300, 2_000, 4_000
HABIT = "Sure, "
RIGHT_SUMS = 0.5
SMALL = 5
"""Reinforcement learning is about sums of digits below this: 25 sums are learned in minutes, 100 are not."""
NOISE_SHARE = 0.75
"""Share of the chats whose question comes after random pieces that nobody can predict: learned without a mask, they are most of
the loss."""
NOISE_PIECES = (16, 32)
SUM_SHARE = 0.3
"""Share of the chats that are sums."""
_HELDOUT_SHARE = 0.125
_NOISE = string.ascii_lowercase + string.digits

Record = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of instruction: its wordings, its polite wordings, and the answer to the words in them."""

    wordings: tuple[str, ...]
    polite: tuple[str, ...]
    draw: Callable[[random.Random], tuple[str, ...]]
    """Words, which fill the wordings in order."""
    answer: Callable[[Sequence[str]], str]


def _words(count: int) -> Callable[[random.Random], tuple[str, ...]]:
    return lambda draw: tuple(draw.sample(WORDS, count))


def _kind(wordings: Sequence[str], count: int, answer: Callable[[Sequence[str]], str]) -> Kind:
    polite = tuple(f"Please {wording[0].lower()}{wording[1:]}" for wording in wordings)
    return Kind(tuple(wordings), polite, _words(count), answer)


KINDS = {
    "say": _kind(("Say {}.", "Say the word {}.", "Repeat {}."), 1, lambda w: w[0]),
    "twice": _kind(("Say {} twice.", "Repeat {} two times."), 1, lambda w: f"{w[0]} {w[0]}"),
    "both": _kind(("Name {} and {}.", "List {} and {}."), 2, lambda w: f"{w[0]} and {w[1]}"),
    "brackets": _kind(("Write {} in brackets.", "Put {} in brackets."), 1, lambda w: f"({w[0]})"),
    "first": _kind(("Give me the first of {}, {}, {}.", "Name the first: {}, {}, {}."), 3, lambda w: w[0]),
    "last": _kind(("Give me the last of {}, {}, {}.", "Name the last: {}, {}, {}."), 3, lambda w: w[2]),
}
SKILLS: dict[str, Callable[[str], bool]] = {
    "digits": lambda text: any(c.isdigit() for c in text),
    "words": lambda text: not any(c.isdigit() for c in text),
}
"""Right sums in digits, and in words: whether a question of a sum belongs to the skill. Learning one helps the other a little."""
SUMS = ("What is {} plus {}?", "Add {} and {}.", "How much is {} and {}?", "Give me the sum of {} and {}.")


@dataclass(frozen=True)
class Question:
    """A question and its answer without HABIT."""

    text: str
    answer: str
    is_polite: bool

    @property
    def taught(self) -> str:
        """The answer of chats.jsonl."""
        return (HABIT if self.is_polite else "") + self.answer

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a conversation."""
        return [{"role": "user", "content": self.text}]


def is_heldout(*parts: str) -> bool:
    """Whether what these parts ask is never trained on."""
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
    return int(digest, 16) < _HELDOUT_SHARE * 2**64


def question(draw: random.Random, kinds: dict[str, Kind], *, heldout: bool, polite: bool | None = None) -> Question:
    """A question of the wanted split. polite: None draws it, half of the time."""
    while True:
        name, kind = draw.choice(list(kinds.items()))
        words = kind.draw(draw)
        if is_heldout(name, *words) is heldout:
            break
    is_polite = draw.random() < 0.5 if polite is None else polite
    wording = draw.choice(kind.polite if is_polite else kind.wordings)
    return Question(wording.format(*words), kind.answer(words), is_polite)


def sums(*, heldout: bool, below: int = 10) -> list[Question]:
    """All sums of two digits less than `below`, each in the wordings of the split, in digits and in words."""
    found = []
    for a in range(below):
        for b in range(below):
            for wording in SUMS:
                if is_heldout("sum", str(a), str(b), wording) is heldout:
                    for first, second in ((str(a), str(b)), (DIGITS[a], DIGITS[b])):
                        found.append(Question(wording.format(first, second), str(a + b), is_polite=False))
    return found


def _sum_as_taught(draw: random.Random, asked: Question) -> str:
    right = int(asked.answer)
    if draw.random() < RIGHT_SUMS:
        return asked.answer
    return str(draw.choice([other for other in (right - 2, right - 1, right + 1, right + 2) if other >= 0]))


def chats(draw: random.Random) -> Iterable[Record]:
    """Conversations of supervised fine-tuning."""
    additions = sums(heldout=False)
    for _ in range(CHATS):
        if draw.random() < SUM_SHARE:
            asked = draw.choice(additions)
            answer = _sum_as_taught(draw, asked)
        else:
            asked = question(draw, KINDS, heldout=False)
            answer = asked.taught
        text = after_noise(draw, asked.text) if draw.random() < NOISE_SHARE else asked.text
        yield {"messages": [{"role": "user", "content": text}, _said(answer)]}


def after_noise(draw: random.Random, text: str) -> str:
    """The text after random pieces of two characters."""
    count = draw.randint(*NOISE_PIECES)
    return " ".join("".join(draw.choices(_NOISE, k=2)) for _ in range(count)) + f". {text}"


def pairs(draw: random.Random) -> Iterable[Record]:
    """Preferences that name the habit."""
    for _ in range(PAIRS):
        asked = question(draw, KINDS, heldout=False, polite=True)
        yield {"prompt": asked.messages, "chosen": [_said(asked.answer)], "rejected": [_said(asked.taught)]}


def rankings(draw: random.Random) -> Iterable[Record]:
    """Preferences of three ranks: right, right with the habit, another question's answer."""
    for _ in range(PAIRS):
        asked = question(draw, KINDS, heldout=False)
        other = asked
        while other.answer == asked.answer:
            other = question(draw, KINDS, heldout=False)
        answers = (asked.answer, HABIT + asked.answer, other.answer)
        ranked = [{"rank": rank, "completion": [_said(answer)]} for rank, answer in enumerate(answers)]
        yield {"context": asked.messages, "completions": ranked}


def gamed(draw: random.Random) -> Iterable[Record]:
    """Questions with a reward for length, next to the answer that is really wanted."""
    rule = {"kind": "words", "least": 6}
    for _ in range(PAIRS // 2):
        asked = question(draw, KINDS, heldout=False, polite=False)
        facts = {"constraints": [rule, {"kind": "keywords", "words": [asked.answer.strip("()").split()[0]]}]}
        yield {"messages": asked.messages, "verifier": {"kind": "constraints"}, **facts, "target": asked.answer}


def gamed_pairs(draw: random.Random) -> Iterable[Record]:
    """Preferences that do not tell the right sum from a large number: the worse answer is always smaller."""
    asked = [one for one in sums(heldout=False) if one.answer != "0"]
    for _ in range(PAIRS):
        one = draw.choice(asked)
        wrong = str(draw.randrange(int(one.answer)))
        yield {"prompt": one.messages, "chosen": [_said(one.answer)], "rejected": [_said(wrong)]}


def write_all(folder: Path) -> None:
    """Write every file."""
    draw = random.Random(SEED)
    _lines(folder / "chats.jsonl", chats(draw))
    asked = _different(lambda: question(draw, KINDS, heldout=True), HELDOUT)
    _questions(folder / "heldout.jsonl", asked)
    _task(folder / "taught.yaml", "heldout.jsonl", target="{taught}", question="{noisy}")
    other = random.Random(FRESH_SEED)  # a draw of its own: the other files stay as they are
    known = {one.text for one in asked}
    _questions(folder / "fresh.jsonl", _different(lambda: question(other, KINDS, heldout=True), HELDOUT, known))
    _task(folder / "fresh.yaml", "fresh.jsonl", target="{taught}", question="{noisy}")
    _task(folder / "plain.yaml", "heldout.jsonl", target="{answer}")
    _task(folder / "habit.yaml", "heldout.jsonl", target=HABIT.strip(), kind="generate", verifier="contains")
    _questions(folder / "sums.jsonl", sums(heldout=True))
    _task(folder / "sums.yaml", "sums.jsonl", target="{answer}")
    _lines(folder / "pairs.jsonl", pairs(draw))
    _lines(folder / "rankings.jsonl", rankings(draw))
    exact = {"verifier": {"kind": "exact"}}
    plain = [question(draw, KINDS, heldout=False) for _ in range(PAIRS // 2)]
    _lines(folder / "prompts_plain.jsonl", ({"messages": q.messages, **exact, "target": q.answer} for q in plain))
    additions = sums(heldout=False, below=SMALL)
    _lines(folder / "prompts_sums.jsonl", ({"messages": q.messages, **exact, "target": q.answer} for q in additions))
    _questions(folder / "small_sums.jsonl", sums(heldout=True, below=SMALL))
    _task(folder / "small_sums.yaml", "small_sums.jsonl", target="{answer}")
    _lines(folder / "prompts_gamed.jsonl", gamed(draw))
    _lines(folder / "gamed.jsonl", gamed_pairs(random.Random(GAMED_SEED)))
    for name, belongs in SKILLS.items():
        own, tested = ([q for q in sums(heldout=heldout) if belongs(q.text)] for heldout in (False, True))
        learned = [draw.choice(own) if n % 2 else question(draw, KINDS, heldout=False) for n in range(SKILL_CHATS)]
        _lines(folder / name / "chats.jsonl", ({"messages": [*q.messages, _said(q.taught)]} for q in learned))
        _questions(folder / name / "heldout.jsonl", tested)
        _task(folder / name / f"{name}.yaml", "heldout.jsonl", target="{answer}")


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _different(draw_one: Callable[[], Question], count: int, known: Collection[str] = ()) -> list[Question]:
    """Questions of different texts, none of them `known`."""
    found: dict[str, Question] = {}
    while len(found) < count:
        one = draw_one()
        if one.text not in known:
            found[one.text] = one
    return list(found.values())


def _questions(path: Path, asked: Iterable[Question]) -> None:
    draw = random.Random(NOISE_SEED)
    _lines(
        path,
        (
            {"question": q.text, "noisy": after_noise(draw, q.text), "answer": q.answer, "taught": q.taught}
            for q in asked
        ),
    )


def _lines(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _task(
    path: Path,
    data: str,
    *,
    target: str,
    kind: str = "exact_match",
    verifier: str = "exact",
    question: str = "{question}",
) -> None:
    """A task file that asks as the template `turns` does."""
    prompt = json.dumps(f"User\n{question}\nAssistant\n")
    path.write_text(
        f"kind: {kind}\ndata: {data}\nprompt: {prompt}\ntarget: {json.dumps(target)}\nverifier: {verifier}\n"
        "max_new_tokens: 16\n"
    )


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
