"""Long-context tasks have the stated length in the model's tokens, can be solved from their text, and depend on the seed only."""

import collections
import re

import pytest
from shards import TEXT

from data.tokenizer import Tokenizer, train_tokenizer
from recipes.schema.data import TokenizerConfig
from recipes.schema.errors import DataError
from recipes.schema.tasks import LONG_CONTEXT, long_context
from train.evaluate.tasks.catalog import names_of, open_tasks
from train.evaluate.tasks.long_context import open_long_context
from train.evaluate.tasks.task import Task, request_of, split_pair


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A coarse tokenizer: about two characters per token."""
    words = "One of the special magic numbers is hidden. The grass is green. " * 20
    return train_tokenizer([TEXT + words], TokenizerConfig(vocab_size=350))


def solved(task: Task) -> list[str]:
    """Answers found by parsing the prompts, one per item."""
    answers = []
    for item in task.items:
        kind = task.name.split("-")[0]
        if kind in ("needle", "multikey"):
            key = re.search(r"magic number for (\w+) mentioned", item.prompt)
            assert key is not None
            (value,) = re.findall(rf"numbers for {key[1]} is: (\d+)\.", item.prompt)
            answers.append(f" {value}")
        elif kind == "tracking":
            (value,) = set(re.findall(r"assigned the value (\d+)", item.prompt))
            (first,) = re.findall(rf"VAR (\w+) = {value}", item.prompt)
            names, links = [first], dict((b, a) for a, b in re.findall(r"VAR (\w+) = VAR (\w+)", item.prompt))
            while names[-1] in links:
                names.append(links[names[-1]])
            answers.append("\n".join(names))
        else:
            counts = collections.Counter(re.findall(r"\d+\. (\w+)", item.prompt))
            common, rest = counts.most_common()[:10], counts.most_common()[10:]
            assert all(count == common[0][1] for _, count in common) and all(n < common[0][1] for _, n in rest)
            answers.append("\n".join(sorted(word for word, _ in common)))
    return answers


@pytest.mark.parametrize("kind", LONG_CONTEXT)
def test_items_fill_their_length_and_their_text_has_the_answer(kind: str, tokenizer: Tokenizer) -> None:
    task = open_long_context(kind, 4096, tokenizer=tokenizer, seed=3, items=3)
    reserved = task.max_new_tokens
    for item, answer in zip(task.items, solved(task), strict=True):
        used = len(tokenizer.prompt(item.prompt + ("" if reserved else item.targets[0]))) + reserved
        assert 0.93 * 4096 < used <= 4096
        wanted = item.targets[0] if kind != "words" else "\n".join(sorted(item.targets[0].split("\n")))
        assert answer == wanted
        assert task.judge is None or task.judge(item, f"they are {item.targets[0]}".replace("\n", ", ")) == 1
    assert len({item.prompt for item in task.items}) == 3
    again = open_long_context(kind, 4096, tokenizer=tokenizer, seed=3, items=3)
    other = open_long_context(kind, 4096, tokenizer=tokenizer, seed=4, items=3)
    assert again.hash == task.hash != other.hash


def test_lengths_that_are_too_short_are_refused_and_names_are_checked(tokenizer: Tokenizer) -> None:
    assert long_context("needle-128k") == ("needle", 131072) and long_context("needle-3k") is None
    with pytest.raises(DataError, match=r"there is no task 'neddle-4k'\. Did you mean needle-4k\?"):
        open_tasks(["neddle-4k"], tokenizer=tokenizer, seed=0)
    with pytest.raises(DataError, match=r"there is no task 'xyz'\. Use needle-1k \.\.\. needle-128k"):
        open_tasks(["xyz"], tokenizer=tokenizer, seed=0)
    with pytest.raises(DataError, match=r"has an empty name"):
        names_of("needle-1k,,words-1k")
    coarse = train_tokenizer([TEXT], TokenizerConfig(vocab_size=257))  # a token a byte
    with pytest.raises(DataError, match=r"words-1k: the shortest item takes more than 1,024 tokens"):
        open_long_context("words", 1024, tokenizer=coarse, seed=0, items=1)


def test_contexts_and_targets_are_cut_where_the_tokens_allow(tokenizer: Tokenizer) -> None:
    """Blanks go to the target; if a token spans the border, the parts are encoded separately."""
    for context, target in [
        ("the quick", " brown"),
        ("the quick ", "brown"),
        ("the qui", "ck"),
        ("", "the"),
        ("  ", "x"),
    ]:
        before, after = split_pair(tokenizer, context, target)
        assert before and after
        assert tokenizer.decode(before + after) == context + target
        assert tokenizer.decode(after).strip(" ") == target.strip(" ")
    assert split_pair(tokenizer, "", "the")[0] == [tokenizer.eod]
    begun = train_tokenizer([TEXT], TokenizerConfig(vocab_size=300, begin_of_document="<s>", special_tokens={"<s>": 1}))
    assert split_pair(begun, "", "the")[0] == [begun.bod] and split_pair(begun, "the", " dog")[0][0] == begun.bod
    ended = request_of(begun, "the", " dog", end_of_document=True)
    assert ended.target[-1] == begun.eod and ended.target[:-1] == request_of(begun, "the", " dog").target
