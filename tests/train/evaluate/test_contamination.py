"""Task texts in training data are found in any case and punctuation, with their document, and no other text is reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from task_files import command, task_in

from data.prepare import prepare
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError
from train.evaluate import contamination
from train.evaluate.contamination import Match, find_overlap, gram_length, words_of
from train.evaluate.tasks.files import open_task_file

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(count: int, seed: int) -> list[str]:
    drawn = np.random.default_rng(seed)
    return ["".join(LETTERS[i] for i in drawn.integers(0, 26, 6)) for _ in range(count)]


def sentence(count: int, seed: int) -> str:
    return " ".join(words(count, seed))


QUESTION = sentence(20, 1)
"""An item of 20 words that the data holds, in another case and with punctuation."""
HALF = words(26, 2)
"""An item of which the data holds 13 words in a row; one of which it holds only 12 is clean."""
ITEMS = [
    {"text": QUESTION},
    {"text": " ".join(HALF)},
    {"text": sentence(30, 3)},
    {"text": sentence(3, 4)},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of two sources: one jsonl file of many records, one of a long text."""
    root = tmp_path_factory.mktemp("contaminated")
    shown = QUESTION.upper().replace(" ", ", ", 5)
    clean = " ".join(HALF[:12])
    records = [sentence(40, 100 + i) for i in range(200)]
    records[17] = f"{sentence(10, 50)} ({shown}!) {sentence(10, 51)}"
    records[90] = f"{sentence(10, 52)} {clean} {sentence(10, 53)}"
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    (root / "long.txt").write_text(
        f"{sentence(9, 59)}\n{sentence(9000, 60)} {' '.join(HALF[5:18])} {sentence(500, 61)}"
    )
    config = DataConfig(
        folder=str(root / "data"),
        row_tokens=64,
        workers=1,
        heldout_fraction=0.01,
        tokenizer=TokenizerConfig(vocab_size=400),
        sources={
            "web": SourceConfig(path=str(root / "texts.jsonl")),
            "book": SourceConfig(path=str(root / "long.txt"), heldout_fraction=0.0),
        },
    )
    prepare(config, console=Console(quiet=True))
    return root / "data"


def tasks_in(path: Path, items: list[dict[str, Any]]) -> Any:
    return open_task_file(task_in(path, items, kind="rolling", prompt="{text}"))


def test_n_is_the_fifth_percentile_between_8_and_13_and_words_have_no_punctuation() -> None:
    assert (gram_length([3, 3]), gram_length([100] * 50), gram_length([10] * 9)) == (8, 13, 10)
    assert words_of("It's  a TEST, isn't it?\n(Yes!)") == ["it", "s", "a", "test", "isn", "t", "it", "yes"]


@pytest.mark.parametrize("block", [1 << 20, 1 << 12], ids=["whole", "blocks"])
def test_documents_that_hold_items_are_named(
    folder: Path, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a long document is read in blocks and the text crosses a border."""
    monkeypatch.setattr(contamination, "_BLOCK_TOKENS", block)
    task = tasks_in(tmp_path, [{"text": sentence(30, 1000 + i)} for i in range(60)] + ITEMS)
    found = find_overlap([task], folder)
    by_item = {match.item.rpartition(":")[2]: match for match in found.matches}
    assert set(by_item) == {"61", "62"}
    web, book = by_item["61"], by_item["62"]
    assert (web.source, Path(web.file).name, web.record) == ("web", "texts.jsonl", 17)
    assert (book.source, Path(book.file).name, book.record) == ("book", "long.txt", 0)
    assert web.text == " ".join(QUESTION.split()[:13]) and book.text == " ".join(HALF[5:18])
    overlap = found.tasks["mine"]
    assert (overlap.words, overlap.items, overlap.short, len(overlap.dirty)) == (13, 64, 1, 2)
    assert found.documents >= 190


def test_a_clean_task_has_no_matches_and_long_lists_are_cut(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_overlap([tasks_in(tmp_path, [{"text": sentence(30, 9)}])], folder).matches == []
    monkeypatch.setattr(contamination, "_MOST_FOUND", 1)
    found = find_overlap([tasks_in(tmp_path, [ITEMS[0], ITEMS[1]] * 2)], folder)
    assert len(found.matches) == 1 and found.left_out == 3 and isinstance(found.matches[0], Match)


def test_the_command_prints_and_writes_what_it_found(folder: Path, tmp_path: Path) -> None:
    path = task_in(tmp_path, ITEMS[:2], kind="rolling", prompt="{text}")
    status, text = command("--contamination", str(folder), "--tasks", str(path), "--out", str(tmp_path / "out"))
    assert status == 0 and "texts.jsonl record 17 (source web, document " in text and "2 of 2 (100.0%)" in text, text
    written = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert len(written["matches"]) == 2 and written["tasks"]["mine"]["words"] == 13
    status, text = command("--contamination", str(tmp_path), "--tasks", str(path))
    assert status == 2 and "no prepared data" in text
    with pytest.raises(DataError):
        find_overlap([], tmp_path)
