"""Finds the training documents that contain texts of the tasks, by n-grams of words as in the GPT-3 paper.

    tasks --words--> n-grams --> {n-gram: items}
    shards, one after another: tokens --> text --> words --> n-grams found --> document, its file, the items it contains

Brown et al., arXiv 2005.14165, appendix C: texts in lower case without punctuation, split at blanks; n is the 5th percentile
of the items' lengths in words, at least 8 and at most 13, for each task; an item is dirty if any of its n-grams occurs. Items
shorter than n words are counted but not judged. Memory depends on the tasks only: one block of data is in memory at a time.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.rows.reader import ShardPool, TokenStream
from data.store.cache import Activity
from data.store.manifest import read_manifest
from data.store.origins import Origins, read_origins
from data.system import disk
from data.tokenizer import Tokenizer, load_tokenizer
from recipes.schema.data import TokenizerConfig
from recipes.schema.typed import build
from train.evaluate.tasks.task import Task

FILE = "contamination.json"
_SHORTEST, _LONGEST = 8, 13
_BLOCK_TOKENS = 1 << 20
"""Tokens of a document that are decoded at once."""
_OVERLAP_TOKENS = 1 << 10
"""Tokens by which two blocks of a document overlap: more than any n-gram has."""
_MOST_FOUND = 10_000
"""Largest number of (document, item) pairs that are listed; further ones are only counted."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Match:
    """A training document that shares an n-gram with an item."""

    task: str
    item: str
    source: str
    file: str
    record: int
    document: int
    """Number in the source's training stream, as `stratum trace --document` takes it."""
    text: str
    """The first n-gram that both contain."""


@dataclass
class TaskOverlap:
    """How many items of a task were found."""

    words: int
    """n of the task's n-grams."""
    items: int
    short: int
    """Number of items with fewer words, which are not judged."""
    dirty: set[str] = field(default_factory=set)
    """Places of items that share an n-gram with the data."""


@dataclass
class Overlap:
    """The result of a search."""

    tasks: dict[str, TaskOverlap]
    matches: list[Match] = field(default_factory=list)
    left_out: int = 0
    """Number of matches that are not in the list."""
    documents: int = 0
    tokens: int = 0

    def write(self, out: Path, folder: Path) -> Path:
        """Write contamination.json into a folder. -> its path."""
        plain = asdict(self) | {"data": str(folder)}
        for task in plain["tasks"].values():
            task["dirty"] = sorted(task["dirty"])
        out.mkdir(parents=True, exist_ok=True)
        disk.write_text(out / FILE, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
        return out / FILE


@dataclass(frozen=True)
class _Grams:
    """The n-grams of one length."""

    words: int
    items: dict[str, list[tuple[str, str]]]
    """n-gram -> the (task, item) pairs that contain it."""


def words_of(text: str) -> list[str]:
    """A text's words in lower case, without punctuation: runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


def gram_length(lengths: Sequence[int]) -> int:
    """n for items of these lengths in words: their 5th percentile, at least 8 and at most 13."""
    return int(np.clip(np.percentile(lengths, 5), _SHORTEST, _LONGEST))


def tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer of a folder of prepared data, with the special tokens it was prepared with. DataError if there is none."""
    manifest = read_manifest(folder)
    known = ("end_of_document", "begin_of_document", "special_tokens", "pattern", "rank_offset", "keep_vocab")
    request = {key: value for key, value in manifest.request.get("tokenizer", {}).items() if key in known}
    config = build(TokenizerConfig, request, "data.tokenizer")
    return load_tokenizer(folder / manifest.tokenizer.file, config, known_fingerprint=manifest.tokenizer.fingerprint)


def find_overlap(tasks: Sequence[Task], folder: Path, *, sources: Sequence[str] = ()) -> Overlap:
    """Search all training documents of a folder of prepared data (or of some sources). DataError if it cannot be read."""
    manifest = read_manifest(folder)
    tokenizer = tokenizer_in(folder)
    overlap, grams = _index(tasks)
    known = {word: None for one in grams for gram in one.items for word in gram.split()}
    pool = ShardPool(lambda entry, suffix: entry.file(folder, suffix), activity=Activity())
    for name, source in manifest.sources.items():
        if sources and name not in sources:
            continue
        entries = source.splits["train"]
        stream = TokenStream(entries, pool)
        origins: tuple[int, Origins] | None = None
        for number, tokens in _documents(stream):
            overlap.documents += 1
            overlap.tokens += tokens.stop - tokens.start
            found: dict[tuple[str, str], str] = {}
            for text in _texts(stream, tokens, tokenizer):
                for one in grams:
                    _search(text, one, known, found)
            for (task, item), gram in found.items():
                overlap.tasks[task].dirty.add(item)
                if len(overlap.matches) == _MOST_FOUND:
                    overlap.left_out += 1
                    continue
                which, local = stream.entry_of(number)
                if origins is None or origins[0] != which:
                    origins = which, read_origins(folder, entries[which])
                origin = origins[1].of(local)
                overlap.matches.append(Match(task, item, name, origin.file, origin.record, number, gram))
    return overlap


def _index(tasks: Sequence[Task]) -> tuple[Overlap, list[_Grams]]:
    overlap = Overlap({})
    by_length: dict[int, dict[str, list[tuple[str, str]]]] = {}
    for task in tasks:
        texts = [(place, words_of(text)) for place, text in task.texts()]
        n = gram_length([len(words) for _, words in texts])
        short = sum(len(words) < n for _, words in texts)
        overlap.tasks[task.name] = TaskOverlap(n, len(texts), short)
        index = by_length.setdefault(n, {})
        for place, words in texts:
            for gram in {" ".join(words[start : start + n]) for start in range(len(words) - n + 1)}:
                index.setdefault(gram, []).append((task.name, place))
    return overlap, [_Grams(n, items) for n, items in sorted(by_length.items())]


def _search(text: str, grams: _Grams, known: dict[str, None], found: dict[tuple[str, str], str]) -> None:
    """Add the items whose n-grams are in the text. Only runs of words that occur in a task are compared."""
    words = words_of(text)
    unknown = np.flatnonzero([word not in known for word in words])
    edges = np.concatenate([[-1], unknown, [len(words)]])
    n = grams.words
    for place in np.flatnonzero(np.diff(edges) > n):
        for start in range(int(edges[place]) + 1, int(edges[place + 1]) - n + 1):
            gram = " ".join(words[start : start + n])
            for key in grams.items.get(gram, ()):
                found.setdefault(key, gram)


def _documents(stream: TokenStream) -> Iterator[tuple[int, range]]:
    """(number, tokens) of each document of the training stream, shard by shard."""
    number = 0
    for which in range(len(stream.entries)):
        ends = int(stream.shard_starts[which]) + np.cumsum(stream.document_lengths(which))
        start = int(stream.shard_starts[which])
        for end in ends.tolist():
            yield number, range(start, end)
            number, start = number + 1, end


def _texts(stream: TokenStream, tokens: range, tokenizer: Tokenizer) -> Iterator[str]:
    """A document's text in overlapping blocks."""
    for start in range(tokens.start, tokens.stop, _BLOCK_TOKENS):
        ids = np.empty(min(tokens.stop, start + _BLOCK_TOKENS + _OVERLAP_TOKENS) - start, dtype=stream.dtype)
        stream.read(start, ids)
        yield tokenizer.decode(ids.tolist())
