"""Rule-based constraints on answers, as in IFEval (arXiv 2311.07911): each is true or false for a text.

The record's fact `constraints` is a list of mappings: [{"kind": "words", "least": 10}, {"kind": "no_commas"}]. The reward is the
share that holds; with {"all": true} among the facts, 1 if all hold and 0 otherwise. Kinds and their parameters: `CONSTRAINTS`.

`least` and `most` bound a count, both included. Words are runs of letters, digits and apostrophes; sentences end with . ! or ?;
paragraphs are separated by empty lines. No rule needs a dictionary or a language model.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from recipes.schema.errors import DataError
from recipes.schema.foreign import printable
from recipes.schema.suggestions import did_you_mean
from train.align.verify.sample import Sample

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_SENTENCE = re.compile(r"[^.!?]*[^\W_][^.!?]*(?:[.!?]+|$)")
_PARAGRAPHS = re.compile(r"\n[ \t]*\n+")
_BULLET = re.compile(r"(?m)^[ \t]*[*+-][ \t]+\S")
_NUMBERED = re.compile(r"(?m)^[ \t]*\d{1,4}[.)][ \t]+\S")
_HIGHLIGHT = re.compile(r"\*{1,2}[^*\n]*[^*\s][^*\n]*\*{1,2}")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_TITLE = re.compile(r"<<[^<>\n]*[^<>\s][^<>\n]*>>")
_HEADING = re.compile(r"(?m)^#{1,6}[ \t]+\S")


def words_of(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text)


def sentences_of(text: str) -> list[str]:
    """The sentences of a text; one has at least a letter or a digit."""
    return [found.strip() for found in _SENTENCE.findall(text)]


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of a text that are not empty."""
    return [part.strip() for part in _PARAGRAPHS.split(text) if part.strip()]


def _within(count: int, least: int, most: int | None) -> bool:
    return least <= count and (most is None or count <= most)


def _count_of(word: str, text: str) -> int:
    """How often a word or phrase occurs as whole words, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _words(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(words_of(text)), least, most)


def _sentences(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(sentences_of(text)), least, most)


def _paragraphs(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(paragraphs_of(text)), least, most)


def _lines(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(sum(bool(line.strip()) for line in text.splitlines()), least, most)


def _characters(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(text.strip()), least, most)


def _sentence_words(text: str, *, most: int) -> bool:
    return all(len(words_of(sentence)) <= most for sentence in sentences_of(text))


def _keywords(text: str, *, words: list) -> bool:
    return all(_count_of(word, text) for word in words)


def _forbidden_words(text: str, *, words: list) -> bool:
    return not any(_count_of(word, text) for word in words)


def _keyword_count(text: str, *, word: str, least: int = 0, most: int | None = None) -> bool:
    return _within(_count_of(word, text), least, most)


def _letter_count(text: str, *, letter: str, least: int = 0, most: int | None = None) -> bool:
    return _within(text.lower().count(letter.lower()), least, most)


def _paragraph_first_word(text: str, *, paragraph: int, word: str) -> bool:
    parts = paragraphs_of(text)
    first = words_of(parts[paragraph - 1])[:1] if 1 <= paragraph <= len(parts) else []
    return [found.lower() for found in first] == [word.lower()]


def _placeholders(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(_PLACEHOLDER.findall(text)), least, most)


def _postscript(text: str, *, marker: str = "P.S.") -> bool:
    return any(line.lstrip().startswith(marker) and line.strip() != marker for line in text.splitlines()[1:])


def _bullets(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(_BULLET.findall(text)), least, most)


def _numbered_items(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(_NUMBERED.findall(text)), least, most)


def _highlights(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(_HIGHLIGHT.findall(text)), least, most)


def _headings(text: str, *, least: int = 0, most: int | None = None) -> bool:
    return _within(len(_HEADING.findall(text)), least, most)


def _sections(text: str, *, marker: str, least: int = 0, most: int | None = None) -> bool:
    count = len(re.findall(rf"(?m)^[ \t]*{re.escape(marker)}[ \t]+\d+", text))
    return _within(count, least, most)


def _choice(text: str, *, options: list) -> bool:
    return text.strip() in options


def _json(text: str) -> bool:
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3]
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return _TITLE.search(text) is not None


def _code_block(text: str) -> bool:
    return len(re.findall(r"(?m)^```", text)) >= 2


def _table(text: str) -> bool:
    return re.search(r"(?m)^\|.+\|[ \t]*\n\|(?:[ \t]*:?-+:?[ \t]*\|)+", text) is not None


def _two_answers(text: str, *, separator: str = "******") -> bool:
    parts = [part.strip() for part in text.split(separator)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _starts_with(text: str, *, phrase: str) -> bool:
    return text.strip().lower().startswith(phrase.strip().lower())


def _ends_with(text: str, *, phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(phrase.strip().lower())


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, *, least: int = 0, most: int | None = None) -> bool:
    count = sum(word.isupper() for word in words_of(text))
    return _within(count, least, most)


def _uppercase(text: str) -> bool:
    return text.isupper()


def _lowercase(text: str) -> bool:
    return text.islower()


def _title_case(text: str) -> bool:
    letters = [word for word in words_of(text) if word[0].isalpha()]
    return bool(letters) and all(word[0].isupper() for word in letters)


def _no_commas(text: str) -> bool:
    return not set(text) & set(",\uff0c\u060c")  # also the full-width and the Arabic one


def _no_digits(text: str) -> bool:
    return not any(character.isdigit() for character in text)


def _ascii(text: str) -> bool:
    return text.isascii()


def _unique_words(text: str) -> bool:
    found = [word.lower() for word in words_of(text)]
    return len(set(found)) == len(found)


def _unique_sentences(text: str) -> bool:
    found = [sentence.lower() for sentence in sentences_of(text)]
    return len(set(found)) == len(found)


CONSTRAINTS: dict[str, Callable[..., bool]] = {
    # length
    "words": _words, "sentences": _sentences, "paragraphs": _paragraphs, "lines": _lines, "characters": _characters,
    "sentence_words": _sentence_words,
    # words and letters
    "keywords": _keywords, "forbidden_words": _forbidden_words, "keyword_count": _keyword_count,
    "letter_count": _letter_count, "paragraph_first_word": _paragraph_first_word, "unique_words": _unique_words,
    "unique_sentences": _unique_sentences,
    # parts
    "placeholders": _placeholders, "postscript": _postscript, "bullets": _bullets, "numbered_items": _numbered_items,
    "highlights": _highlights, "headings": _headings, "sections": _sections, "title": _title, "code_block": _code_block,
    "table": _table, "two_answers": _two_answers, "json": _json, "choice": _choice,
    # beginning and end
    "starts_with": _starts_with, "ends_with": _ends_with, "quoted": _quoted,
    # letters' case and signs
    "capital_words": _capital_words, "uppercase": _uppercase, "lowercase": _lowercase, "title_case": _title_case,
    "no_commas": _no_commas, "no_digits": _no_digits, "ascii": _ascii,
}  # fmt: skip
"""Every kind of constraint: a function of the answer and the mapping's parameters."""


def check_constraint(plain: Any) -> tuple[str, dict[str, Any]]:
    """(kind, parameters) of a constraint's mapping. DataError says what is wrong with it."""
    if not isinstance(plain, Mapping):
        raise DataError(f"a constraint is {type(plain).__name__}, not a mapping with a `kind`")
    given = dict(plain)
    kind = given.pop("kind", None)
    if kind not in CONSTRAINTS:
        hint = did_you_mean(str(kind), CONSTRAINTS, otherwise=f"There are: {', '.join(CONSTRAINTS)}.")
        raise DataError(f"there is no constraint {printable(str(kind), most=100)!r}. {hint}")
    known = {name: p for name, p in inspect.signature(CONSTRAINTS[kind]).parameters.items() if name != "text"}
    if unknown := sorted(str(name) for name in given if name not in known):
        takes = f"It takes {', '.join(known)}." if known else "It takes none."
        raise DataError(f"constraint {kind}: unknown parameter {printable(unknown[0], most=100)}. {takes}")
    if missing := [name for name, p in known.items() if p.default is p.empty and name not in given]:
        raise DataError(f"constraint {kind} needs {', '.join(missing)}")
    for name, value in given.items():
        if not _fits(known[name].annotation, value):
            raise DataError(f"constraint {kind}: {name}={value!r} is not {_NAMES[known[name].annotation]}")
    if "most" in known and known["most"].default is None and "least" not in given and "most" not in given:
        raise DataError(f"constraint {kind} needs least, most or both")
    return kind, given


_NAMES = {
    int: "a whole number from 0 on", int | None: "a whole number from 0 on", str: "a text that is not empty",
    list: "a list of texts that are not empty",
}  # fmt: skip


def _fits(annotation: Any, value: Any) -> bool:
    if annotation is str:
        return isinstance(value, str) and bool(value)
    if annotation is list:
        return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)
    return type(value) is int and value >= 0


def holds(plain: Any, answer: str) -> bool:
    """Whether an answer keeps a constraint. An empty answer keeps none. DataError if the mapping is wrong."""
    kind, parameters = check_constraint(plain)
    return bool(answer.strip()) and CONSTRAINTS[kind](answer, **parameters)


def listed_constraints(sample: Sample) -> list[Any]:
    """The constraints of a record. DataError without any, or if `all` is not true or false."""
    listed: list[Any] = sample.fact("constraints", list)
    if not listed:
        raise DataError("the record has no constraints")
    if "all" in sample.facts:
        sample.fact("all", bool)
    return listed


def check_constraints(sample: Sample) -> None:
    """DataError says what is wrong with the constraints of a record."""
    for one in listed_constraints(sample):
        check_constraint(one)


def open_constraints() -> Callable[[Sample], float]:
    """The share of a record's constraints that its answer keeps; see the module docstring."""

    def judge(sample: Sample) -> float:
        kept = [holds(one, sample.answer) for one in listed_constraints(sample)]
        return float(all(kept)) if sample.facts.get("all") is True else sum(kept) / len(kept)

    return judge
