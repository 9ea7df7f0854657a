"""Long-context tasks after RULER (Hsieh et al., arXiv 2404.06654), generated from a seed, without downloads.

    needle      a sentence with a number among repeated sentences; which number?                 (RULER's niah_single_1)
    multikey    the same among sentences of the same form, each with another key                 (niah_multikey_2)
    tracking    variables assigned to each other in a chain; which have the first one's value?   (vt, 1 chain, 4 hops)
    words       a long list of words; which ten occur most often?                                (cwe)

Prompts are RULER's, with its answer prefixes, so that a base model can answer. Keys and words are syllables drawn from the
seed instead of a word list. An item has at most the named number of tokens of the model's tokenizer, including the answer.
The answers of needle and multikey are scored as a cloze: an answer is right if its tokens are the likeliest ones, as greedy
decoding would choose. The other two tasks generate text, and the score is the share of the expected names in it.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from data.tokenizer import Tokenizer
from recipes.schema.errors import DataError
from train.evaluate.tasks.task import Item, Kind, Task, context_ids
from train.evaluate.tasks.verify import every

ITEMS = 32
"""Default number of items; RULER has 500."""
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's
_ANSWER_TOKENS = {"tracking": 30, "words": 120}
"""Tokens to generate, as in RULER."""
_LEAST_FILLING = {"needle": 1, "multikey": 4, "tracking": 1, "words": 20}
"""Smallest number of sentences or words around the answer."""
_HOPS = 4
_COMMON = 10
_REPEATS = ((30, 3), (10, 1), (4, 1))
"""How often common and other words occur: RULER's numbers first, smaller ones if they do not fit."""

Maker = Callable[[np.random.Generator, int], Item]
"""(generator, amount of filling) -> item."""


def open_long_context(kind: str, tokens: int, *, tokenizer: Tokenizer, seed: int, items: int | None = None) -> Task:
    """A task of the given kind with items of `tokens` tokens. DataError if the shortest item has more with this tokenizer."""
    name = f"{kind}-{tokens // 1024}k"
    makers: dict[str, list[Maker]] = {
        "needle": [partial(_needle, is_noise=True)],
        "multikey": [partial(_needle, is_noise=False)],
        "tracking": [_tracking],
        "words": [partial(_words, common_times=common, other_times=other) for common, other in _REPEATS],
    }
    answer_tokens = _ANSWER_TOKENS.get(kind, 0)

    def size(item: Item) -> int:
        target = "" if answer_tokens else item.targets[0]
        return len(context_ids(tokenizer, item.prompt + target)) + answer_tokens

    for make in makers[kind]:
        made = [
            _longest(make, (seed, _number_of(kind), index), size, tokens, least=_LEAST_FILLING[kind])
            for index in range(items or ITEMS)
        ]
        found = [item for item in made if item is not None]
        if len(found) == len(made):
            break
    else:
        raise DataError(
            f"{name}: the shortest item takes more than {tokens:,} tokens with this tokenizer. Use a longer one."
        )
    placed = tuple(Item(f"{name} {i}", item.prompt, item.targets) for i, item in enumerate(found))
    task_kind: Kind = "generate" if answer_tokens else "cloze"
    return Task(
        name=name,
        kind=task_kind,
        items=placed,
        max_new_tokens=answer_tokens,
        judge=every if answer_tokens else None,
        is_graded=True,
        row_tokens=tokens,
        settings={"seed": seed},
    )


def _longest(make: Maker, key: Iterable[int], size: Callable[[Item], int], most: int, *, least: int) -> Item | None:
    """The longest item that fits; None if the shortest does not fit. Each size starts from the same random state."""

    def at(amount: int) -> Item:
        return make(np.random.default_rng([*key]), amount)

    shortest, probe = size(at(least)), 32
    if shortest > most:
        return None
    each = (size(at(least + probe)) - shortest) / probe
    amount = least + int((most - shortest) / each)
    while (item := at(amount)) and (excess := size(item) - most) > 0:
        amount = max(least, amount - max(1, round(excess / each)))
    return item


def _needle(rng: np.random.Generator, amount: int, *, is_noise: bool) -> Item:
    keys = _distinct_words(rng, 1 + (0 if is_noise else amount))
    values = rng.integers(1_000_000, 10_000_000, len(keys))
    needles = [f"One of the special magic numbers for {k} is: {v}." for k, v in zip(keys, values, strict=True)]
    sentences = [_NOISE] * amount if is_noise else needles[1:]
    sentences.insert(int(rng.integers(0, len(sentences) + 1)), needles[0])
    text = "\n".join(sentences)
    prompt = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the "
        f"numbers afterwards.\n{text}\nWhat is the special magic number for {keys[0]} mentioned in the provided text? The "
        f"special magic number for {keys[0]} mentioned in the provided text is"
    )
    return Item("", prompt, (f" {values[0]}",))


def _tracking(rng: np.random.Generator, amount: int) -> Item:
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(chr(65 + int(letter)) for letter in rng.integers(0, 26, 5))
        names += [] if name in names else [name]
    value = int(rng.integers(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names))]
    sentences = [_NOISE] * amount
    places = sorted(int(place) for place in rng.integers(0, amount + 1, len(chain)))
    for offset, (place, line) in enumerate(zip(places, chain, strict=True)):
        sentences.insert(place + offset, line)
    text = "\n".join(sentences)
    prompt = (
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\nQuestion: Find all "
        f"variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of variable "
        f"assignment in the text above, {len(names)} variables are assigned the value {value}, they are:"
    )
    return Item("", prompt, ("\n".join(names),))


def _words(rng: np.random.Generator, amount: int, common_times: int, other_times: int) -> Item:
    """`amount` words that are not among the common ones."""
    words = _distinct_words(rng, _COMMON + amount)
    listed = [w for w in words[:_COMMON] for _ in range(common_times)]
    listed += [w for w in words[_COMMON:] for _ in range(other_times)]
    shuffled = [listed[i] for i in rng.permutation(len(listed))]
    text = " ".join(f"{number}. {word}" for number, word in enumerate(shuffled, start=1))
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
        f"most often.\n{text}\nQuestion: What are the {_COMMON} most common words in the above list? Answer: The top {_COMMON} "
        "words that appear most often in the list are:"
    )
    return Item("", prompt, ("\n".join(words[:_COMMON]),))


def _distinct_words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables; there are 421,875."""
    consonants, vowels = "bdfgklmnprstvwz", "aeiou"
    syllables = np.array([c + v for c in consonants for v in vowels])
    words: dict[str, None] = {}
    while len(words) < count:
        drawn = syllables[rng.integers(0, len(syllables), (count, 3))]
        words |= dict.fromkeys("".join(row) for row in drawn)
    return list(words)[:count]


def _number_of(kind: str) -> int:
    return ("needle", "multikey", "tracking", "words").index(kind)
