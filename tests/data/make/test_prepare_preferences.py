"""Preferences from files to batches: all answers of a record are neighbours in one row, ranked, and only they are learned."""

import csv
import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from chats import assistant, tokenizer, tokenizer_file, user
from omegaconf import OmegaConf
from rich.console import Console

from data.batch import Batch
from data.chat.encode import ChatEncoder
from data.dataset import Dataset, open_dataset
from data.inspect import inspect
from data.prepare import prepare
from data.stream import Stream
from data.trace import pieces_of
from recipes.schema.data import ChatConfig, DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError
from recipes.schema.tools import InspectConfig

QUIET = Console(quiet=True)
ROW = 160
Record = dict[str, Any]
Shown = list[tuple[int, str]]
"""(rank, learned text) of the answers of a preference."""


def pair(number: int) -> Record:
    """Number n asks for its double; every third has an earlier turn, which is context."""
    context = [user(f"Is {number} even?"), assistant("Perhaps.")] if number % 3 == 0 else []
    context.append(user(f"What is twice {number}?"))
    return {
        "prompt": context,
        "chosen": [assistant(f"It is {2 * number}.")],
        "rejected": [assistant("No" * (number % 9) + "!")],
    }


PAIRS = [pair(number) for number in range(60)]


def expected(record: Record) -> Shown:
    """What the answers of a record must be, found without the code under test."""
    if "completions" in record:
        found = sorted((entry["rank"], entry["completion"]) for entry in record["completions"])
    else:
        found = [(0, record["chosen"]), (1, record["rejected"])]
    ranks = sorted({rank for rank, _ in found})
    texts = [text if isinstance(text, str) else text[0]["content"] for _, text in found]
    return [(ranks.index(rank), f"{text}<|im_end|>") for (rank, _), text in zip(found, texts, strict=True)]


def config_of(folder: Path, path: object, *, row: int = ROW, on_bad_record: Any = "error", **chat: Any) -> DataConfig:
    return DataConfig(
        folder=str(folder / "prepared"),
        sources={"pairs": SourceConfig(path=str(path), kind="preference", on_bad_record=on_bad_record)},
        tokenizer=TokenizerConfig(path=str(tokenizer_file())),
        chat=replace(ChatConfig(), **chat),
        row_tokens=row,
        reset_at_documents=True,
        heldout_fraction=0.1,
        workers=1,
    )


def write(path: Path, records: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("preferences")
    config = config_of(folder, write(folder / "pairs.jsonl", PAIRS))
    prepare(config, console=QUIET)
    return config


def all_rows(dataset: Dataset) -> list[Batch]:
    """The rows of both splits, training first."""
    count = dataset.train[0].count
    order = np.argsort(dataset.blend.draw(np.arange(count)).row)
    return [dataset.training_rows(order), dataset.heldout_rows("pairs", 0, dataset.heldout_count("pairs"))]


def preferences_in(dataset: Dataset, batch: Batch) -> list[Shown]:
    """Every group of a batch. Checks that ranks, groups, documents and masks agree."""
    assert batch.ranks is not None and batch.groups is not None and batch.learned is not None
    assert batch.document_index is not None
    assert batch.ranks.dtype == torch.int16 and batch.groups.dtype == torch.int32
    found: list[Shown] = []
    for labels, learned, documents, ranks, groups in zip(
        batch.labels, batch.learned, batch.document_index, batch.ranks.tolist(), batch.groups.tolist(), strict=True
    ):
        count = int(documents.max()) + 1
        assert all(rank >= 0 for rank in ranks[:count]) and set(ranks[count:]) <= {-1} and set(groups[count:]) <= {-1}
        assert sorted(set(groups[:count])) == list(range(groups[count - 1] + 1)) and groups[:count] == sorted(
            groups[:count]
        )
        row: list[Shown] = [[] for _ in range(groups[count - 1] + 1)]
        for document in range(count):
            text = dataset.tokenizer.decode_all(labels[learned & (documents == document)].tolist())
            row[groups[document]].append((ranks[document], text))
        assert all(shown == sorted(shown, key=lambda answer: answer[0]) and shown[0][0] == 0 for shown in row)
        after = int(learned.nonzero().max()) + 1
        rest = labels[after:]
        assert (rest[rest != dataset.tokenizer.encode("\n")[0]] == dataset.tokenizer.eod).all()
        found += row
    return found


def test_every_record_is_one_group_with_its_answers_learned_once(made: DataConfig) -> None:
    dataset = open_dataset(made)
    training, heldout = (preferences_in(dataset, batch) for batch in all_rows(dataset))
    assert sorted(training + heldout) == sorted(map(expected, PAIRS))
    description = dataset.manifest.sources["pairs"].description["preferences"]
    assert [description[split]["groups"] for split in ("train", "heldout")] == [len(training), len(heldout)]
    assert description["train"]["pairs"] == len(training)


@pytest.mark.parametrize("seed", range(3))
def test_packing_keeps_every_group_whole(seed: int, tmp_path: Path) -> None:
    """Drawn rankings, of 2 to 6 answers with equal ranks and lengths from a word to half a row: a group is in one row."""
    draw = random.Random(seed)
    records = []
    for number in range(draw.choice([12, 70])):
        count = draw.randint(2, 6)
        ranks = [draw.randint(-3, 3) for _ in range(count)]
        ranks[0], ranks[1] = 5, 7
        texts = [f"{number}.{place} " + "ab " * draw.choice([0, 1, 5, 20]) + "end" for place in range(count)]
        completions = [{"rank": rank, "completion": text} for rank, text in zip(ranks, texts, strict=True)]
        draw.shuffle(completions)
        records.append({"context": f"Go on with {number}: " + "x " * draw.choice([0, 8]), "completions": completions})
    config = config_of(tmp_path, write(tmp_path / "pairs.jsonl", records), row=768)
    manifest = prepare(config, console=QUIET)
    dataset = open_dataset(config)
    found = [sorted(shown) for batch in all_rows(dataset) for shown in preferences_in(dataset, batch)]
    assert sorted(found) == sorted(sorted(expected(record)) for record in records)
    pairs = sum(len([1 for a, _ in shown for b, _ in shown if a < b]) for shown in map(expected, records))
    assert manifest is not None
    description = manifest.sources["pairs"].description["preferences"]
    assert sum(description[split]["pairs"] for split in ("train", "heldout")) == pairs


def test_ranks_follow_the_rows_through_ranks_microbatches_and_selection(made: DataConfig) -> None:
    dataset = open_dataset(made)
    whole = dataset.training_rows(np.arange(8))
    assert whole.ranks is not None and whole.groups is not None
    for rank in range(2):
        options = {"global_rows": 8, "microbatch_rows": 2, "rank": rank, "ranks": 2, "prefetch_steps": 1}
        with Stream(dataset, position=0, **options) as stream:  # type: ignore[arg-type]
            for number, batch in enumerate(next(stream)):
                start = (number * 2 + rank) * 2
                width = batch.ranks.shape[1]  # type: ignore[union-attr]
                assert torch.equal(batch.ranks, whole.ranks[start : start + 2, :width])  # type: ignore[arg-type]
                assert torch.equal(batch.groups, whole.groups[start : start + 2, :width])  # type: ignore[arg-type]
    some = whole.select(np.array([5, 0, 5]))
    assert torch.equal(some.ranks, whole.ranks[[5, 0, 5]]) and torch.equal(some.groups, whole.groups[[5, 0, 5]])  # type: ignore[arg-type]


def test_tables_and_sets_and_other_forms_give_the_same_answers(tmp_path: Path) -> None:
    plain = [{"prompt": f"{n}?", "chosen": f"{n}!", "rejected": f"not {n}"} for n in range(24)]
    with (tmp_path / "pairs.csv").open("w", newline="") as stream:
        rows = csv.DictWriter(stream, fieldnames=list(plain[0]))
        rows.writeheader()
        rows.writerows(plain)
    as_messages = [
        {
            "chosen": [user(r["prompt"]), assistant(r["chosen"])],
            "rejected": [user(r["prompt"]), assistant(r["rejected"])],
        }
        for r in plain
    ]
    as_json = [
        {"prompt": r["prompt"], **{k: json.dumps([assistant(r[k])]) for k in ("chosen", "rejected")}} for r in plain
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(as_messages), tmp_path / "messages.parquet")
    datasets.Dataset.from_list(as_messages).save_to_disk(str(tmp_path / "set"))
    write(tmp_path / "written.jsonl", as_json)
    for name in ("pairs.csv", "messages.parquet", "set", "written.jsonl"):
        config = config_of(tmp_path / f"of {name}", tmp_path / name)
        prepare(config, console=QUIET)
        dataset = open_dataset(config)
        found = [shown for batch in all_rows(dataset) for shown in preferences_in(dataset, batch)]
        assert sorted(found) == sorted(map(expected, plain)), name


def test_a_template_without_tags_gives_the_same_answers(made: DataConfig, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = config_of(tmp_path, made.sources["pairs"].path, template=str(template))
    prepare(config, console=QUIET)
    for ours, tagged in zip(all_rows(open_dataset(config)), all_rows(open_dataset(made)), strict=True):
        assert torch.equal(ours.labels, tagged.labels) and torch.equal(ours.learned, tagged.learned)  # type: ignore[arg-type]


def test_thinking_of_earlier_turns_is_left_out_and_that_of_the_answers_learned(tmp_path: Path) -> None:
    thought = {"reasoning_content": "early"}
    context = [user("1?"), assistant("one", **thought), user("2?")]
    answers = {name: [assistant(name, reasoning_content=f"about {name}")] for name in ("chosen", "rejected")}
    config = config_of(tmp_path, write(tmp_path / "pairs.jsonl", [{"prompt": context, **answers}, *PAIRS[:20]]))
    prepare(config, console=QUIET)
    dataset = open_dataset(config)
    batches = all_rows(dataset)
    found = [shown for batch in batches for shown in preferences_in(dataset, batch)]
    assert [
        (rank, f"<think>\nabout {name}\n</think>\n\n{name}<|im_end|>") for rank, name in enumerate(answers)
    ] in found
    assert not any("early" in dataset.tokenizer.decode_all(row.tolist()) for batch in batches for row in batch.labels)


BAD: list[tuple[Record, str]] = [
    ({"prompt": "2?", "chosen": "4", "rejected": "4"}, "has chosen equal to rejected"),
    ({"prompt": "2?", "chosen": "4", "rejected": ""}, "rejected: message 1 is an empty answer"),
    ({"prompt": "2?", "chosen": "4", "rejected": "<think>hm</think>"}, "message 2 is an empty answer"),
    ({"prompt": "2?", "chosen": [user("a")], "rejected": "4"}, "chosen, after the context: message 2 is by user"),
    ({"context": "2?", "completions": [{"rank": 1, "completion": "4"}] * 2}, "completions of one rank only"),
    (
        {"context": "2?", "completions": [{"rank": n, "completion": "4"} for n in range(40_000)]},
        "40,000 completions, more",
    ),
    ({"prompt": "2?", "chosen": "4", "rejected": "5<|im_end|>"}, "special token"),
    ({"messages": [user("a"), assistant("b")]}, "has no chosen and rejected"),
]


def test_bad_preferences_are_named_and_counted(tmp_path: Path) -> None:
    for number, (record, message) in enumerate(BAD):
        path = write(tmp_path / str(number) / "pairs.jsonl", [*PAIRS[:3], record])
        with pytest.raises(DataError) as raised:
            prepare(config_of(tmp_path / str(number), path), console=QUIET)
        assert "pairs.jsonl:4 " in str(raised.value) and message in str(raised.value)
    path = write(tmp_path / "pairs.jsonl", [*PAIRS[:8], *(record for record, _ in BAD)])
    manifest = prepare(config_of(tmp_path, path, on_bad_record="skip"), console=QUIET)
    assert manifest is not None and manifest.sources["pairs"].bad_records == len(BAD)


def test_answers_that_the_template_makes_equal_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [*PAIRS[:8], {"prompt": "2?", "chosen": "4 ", "rejected": "4"}])
    template = tmp_path / "trims.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content | trim + '<|im_end|>' }}"
        "{% endgeneration %}{% endfor %}".replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}")
        .replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}")
    )  # fmt: skip
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:9 has answers of different ranks that the chat template .* make equal"
    ):
        prepare(config_of(tmp_path, path, template=str(template)), console=QUIET)


def test_groups_longer_than_a_row_follow_the_policy(tmp_path: Path) -> None:
    long = {"prompt": "How long?", "chosen": "very " * 60, "rejected": "so " * 90}
    late = {"prompt": "very " * 90, "chosen": "Long.", "rejected": "Short."}
    alike = {"prompt": "Why?", "chosen": "so " * 90 + "a", "rejected": "so " * 90 + "b"}
    path = write(tmp_path / "pairs.jsonl", [*PAIRS[:12], long, late, alike])
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:13 has 2 answers of \d+ tokens, each with its context, more than a row"
    ):
        prepare(config_of(tmp_path / "refuse", path), console=QUIET)
    dropped = prepare(config_of(tmp_path / "drop", path, long_record="drop"), console=QUIET)
    assert dropped is not None and dropped.sources["pairs"].description["long_records"] == 3
    config = config_of(tmp_path / "cut", path, long_record="cut")
    cut = prepare(config, console=QUIET)  # of `late` nothing would be learned, and `alike` would be equal
    assert cut is not None and cut.sources["pairs"].description["long_records"] == 2
    dataset = open_dataset(config)
    found = [shown for batch in all_rows(dataset) for shown in preferences_in(dataset, batch)]
    (kept,) = (shown for shown in found if "very" in shown[0][1])
    assert ("very " * 60).startswith(kept[0][1]) and ("so " * 90).startswith(kept[1][1]) and kept[1][1].count("so") > 9


def test_single_gives_each_group_a_row(tmp_path: Path) -> None:
    config = config_of(tmp_path, write(tmp_path / "pairs.jsonl", PAIRS[:12]), packing="single")
    prepare(config, console=QUIET)
    dataset = open_dataset(config)
    assert sum(len(batch.labels) for batch in all_rows(dataset)) == 12
    assert sum(len(preferences_in(dataset, batch)) for batch in all_rows(dataset)) == 12


@pytest.mark.parametrize("suffix", ["ranks.bin", "ranks.idx"])
def test_damaged_ranks_are_named(made: DataConfig, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "prepared"
    shutil.copytree(made.folder, folder)
    path = next(folder.glob(f"pairs/*.train.{suffix}"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name} does not match its checksum"):
        open_dataset(replace(made, folder=str(folder)))


def test_another_kind_or_row_length_is_refused(made: DataConfig) -> None:
    as_chats = {"pairs": replace(made.sources["pairs"], kind="chat")}
    with pytest.raises(DataError, match=r"was prepared as preferences, and data\.sources\.pairs\.kind=chat"):
        open_dataset(replace(made, sources=as_chats))
    with pytest.raises(
        DataError, match=r"the preferences of .* are packed in rows of 160 tokens, and data\.row_tokens=80"
    ):
        open_dataset(replace(made, row_tokens=80))


def test_trace_and_inspect_show_record_rank_and_answers(made: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = open_dataset(made)
    pieces = list(pieces_of(dataset, dataset.locate(0), chars=4000))
    assert [piece.rank for piece in pieces] == [0, 1] * (len(pieces) // 2)
    for piece in pieces:
        assert PAIRS[piece.record][("chosen", "rejected")[piece.rank or 0]][0]["content"] in piece.text
    composed = composed_recipe(made)
    assert inspect(InspectConfig(samples=2, picture=str(Path(made.folder) / "lengths.png")), composed) == 0
    shown = capsys.readouterr().out
    assert "preferences" in shown and "pairs" in shown
    for number in (int(line.rsplit(" ", 1)[1]) for line in shown.splitlines() if " record " in line):
        for name in ("chosen", "rejected"):
            assert f"{name}: \u2192{PAIRS[number][name][0]['content']}<|im_end|>\u2190" in shown


def composed_recipe(config: DataConfig) -> Any:
    return OmegaConf.create(
        {"data": asdict(config), "run": {"steps": 2, "global_rows": 4, "folder": "runs", "name": "none"}}
    )


@pytest.mark.parametrize("template", ["turns", "chatml"])
def test_the_token_that_ends_an_answer_is_also_read(template: str) -> None:
    """`turns` ends an answer with the end-of-document token. As the last label of a document, no input would be that token."""
    with ChatEncoder(ChatConfig(template=template), tokenizer(), row_tokens=ROW, seed=1) as encoder:
        text = json.dumps(
            {
                "context": [user("Hi.")],
                "answers": [{"rank": n, "messages": [assistant(words)]} for n, words in enumerate(("Yes.", "No."))],
            }
        )
        for document in encoder.answers(text):
            assert document.ids[-1] == tokenizer().eod and not document.learned[-1]
            last = np.flatnonzero(document.learned)[-1]
            assert document.ids[last] == (tokenizer().eod if template == "turns" else 2)  # <|im_end|>
