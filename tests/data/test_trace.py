"""Provenance both ways against the texts themselves, and the commands that show it."""

import ast
import json
import os
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from texts import config_of

from data import commands, inspect, trace
from data.dataset import open_dataset
from data.prepare import prepare
from data.system.console import open_console
from data.trace import documents_of, pieces_of
from recipes.schema.data import DataConfig, SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.tools import TraceConfig


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_a_rows_documents_are_found_in_their_files(prepared: DataConfig, texts: Path, packing: str) -> None:
    """Whole documents have the text of their record; the pieces of a document put together are its tokens."""
    dataset = open_dataset(replace(prepared, packing=packing, row_tokens=64))
    records = [json.loads(line)["content"] for line in (texts / "code.jsonl").read_text().splitlines()]
    parts: dict[tuple[int, int], list] = defaultdict(list)
    whole = 0
    count = dataset.train[0].count * 2
    for position in range(count):
        row = dataset.locate(position)
        slots = 0
        for piece in pieces_of(dataset, row, chars=10_000):
            assert piece.slot == slots
            slots += piece.tokens
            text = records[piece.record] if piece.file.endswith("code.jsonl") else Path(piece.file).read_text()
            assert piece.text in text
            whole += piece.part == "whole"
            if piece.part == "whole":
                assert piece.text == text
            parts[row.source, piece.document].append(piece)
        assert slots == 64
    assert whole > (20 if packing == "best_fit" else 0)


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_steps_of_a_document_are_those_whose_rows_hold_it(prepared: DataConfig, packing: str, capsys) -> None:
    dataset = open_dataset(replace(prepared, packing=packing, row_tokens=32))
    steps, global_rows = 60, 6
    seen = defaultdict(set)
    for position in range(steps * global_rows):
        row = dataset.locate(position)
        for piece in pieces_of(dataset, row, chars=0):
            seen[row.source, piece.document].add((position // global_rows + 1, position))
    for source in range(2):
        for document in (0, 1, 7):
            config = TraceConfig(json=True)
            trace._show_document(dataset, config, source, document, steps=steps, global_rows=global_rows)
            found = json.loads(capsys.readouterr().out)
            assert {(s["step"], s["position"]) for s in found["seen"]} == seen[source, document]
            by_file = TraceConfig(file=found["file"], record=found["record"])
            assert (source, document) in documents_of(dataset, by_file)


def test_questions_without_an_answer_say_why(prepared: DataConfig) -> None:
    dataset = open_dataset(prepared)
    with pytest.raises(DataError, match=r"nothing to trace was given\. Use --step N, --file NAME"):
        documents_of(dataset, TraceConfig(source="verse"))
    with pytest.raises(DataError, match=r"--source vers is not a source of the recipe\. Use one of code, verse"):
        documents_of(dataset, TraceConfig(source="vers", document=1))
    with pytest.raises(DataError, match=r"no document came from 0x.txt. Did you mean"):
        documents_of(dataset, TraceConfig(file="0x.txt"))
    held = dataset.origin(dataset.heldout[0].stream, 0)
    with pytest.raises(DataError, match="is held out for evaluation: no step trains on it"):
        documents_of(dataset, TraceConfig(file=held.file, record=held.record))


def command(program, tmp_path: Path, config: DataConfig, *words: str) -> int:
    """Run a command with a separate recipe, as from a shell."""
    plain = json.loads(json.dumps(asdict(config)))
    (tmp_path / "own").mkdir(exist_ok=True)
    (tmp_path / "own" / "mine.yaml").write_text(yaml.safe_dump({"run": {"steps": 40, "global_rows": 4}, "data": plain}))
    return program(["-cn", "mine", "--config-dir", str(tmp_path / "own"), *words])


def test_trace_from_the_command_line(prepared: DataConfig, tmp_path: Path, capsys) -> None:
    assert command(commands.trace, tmp_path, prepared, "--step", "3", "--chars", "40") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step 3: rows 8 to 11 of data ") and shown.count("position ") == 4
    assert "code.jsonl record" in shown and ".txt record 0" in shown
    assert command(commands.trace, tmp_path, prepared, "--file", "code.jsonl", "--record", "5") == 0
    assert "code.jsonl record 5: document" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command(commands.trace, tmp_path, prepared, "--step", "0")
    assert "error: --step=0 is out of range" in capsys.readouterr().err


def test_inspect_from_the_command_line(prepared: DataConfig, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "lengths.png"
    words = ["--verify", f"--picture={picture}"]
    assert command(commands.inspect, tmp_path, prepared, *words) == 0
    shown = capsys.readouterr().out
    assert "files match their checksums" in shown and "verse" in shown and "epochs" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    shard = min(Path(prepared.folder).rglob("*.bin"))
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(raw)
    assert command(commands.inspect, tmp_path, prepared, *words) == 2
    assert f"{shard} does not match its checksum" in capsys.readouterr().err


def test_inspect_limits_number_and_length_of_samples(prepared: DataConfig, tmp_path: Path, capsys) -> None:
    picture = f"--picture={tmp_path / 'lengths.png'}"
    dataset = open_dataset(prepared)
    for samples in (0, 3):
        assert command(commands.inspect, tmp_path, prepared, picture, f"--samples={samples}", "--chars=5") == 0
        lines = capsys.readouterr().out.splitlines()
        heads = [line.split(" document ")[0] for line in lines if " document " in line and line.endswith(" tokens")]
        for name, rows in zip(dataset.source_names, dataset.train, strict=True):
            assert heads.count(name) == min(samples, rows.stream.documents)
        shown = [ast.literal_eval(line) for line in lines if line[:1] in ("'", '"')]
        assert len(shown) == len(heads) and all(0 < len(text) <= 5 for text in shown)
    for option, value, most in (("samples", 1001, 1000), ("chars", 100_001, 100_000)):
        with pytest.raises(SystemExit, match="2"):
            command(commands.inspect, tmp_path, prepared, picture, f"--{option}={value}")
        message = f"--{option}={value} is out of range. Use a value >= 0 and <= {most}."
        assert message in capsys.readouterr().err


def test_names_and_texts_of_others_send_no_control_characters_to_the_terminal(tmp_path: Path, capsys) -> None:
    """Escape codes, a C1 control character, line breaks, text direction, rich's markup and bytes that are not UTF-8, in names
    of files and in texts."""
    evil = "\x1b[2J\x9b31m\n\u202e[bold]"
    (tmp_path / "in").mkdir()
    names = [f"a{evil}.jsonl", os.fsdecode(b"b\xff.jsonl"), f".{evil}.jsonl"]
    for name in names:
        lines = [json.dumps({"text": f"{name!r}{n}{evil} " + "some words " * n}) + "\n" for n in range(40)]
        (tmp_path / "in" / name).write_text("".join(lines))
    sources = {"a": SourceConfig(path=str(tmp_path / "in"))}
    config = config_of(tmp_path, sources=sources, folder=str(tmp_path / f"out{evil}"))
    prepare(config, console=open_console())
    assert "left out 1 files" in check_terminal(capsys)
    dataset = open_dataset(config)
    documents = range(dataset.train[0].stream.documents)
    assert {dataset.origin(dataset.train[0].stream, n).file for n in documents} == {
        str(tmp_path / "in" / name) for name in names[:2]
    }
    for program, words in (
        (commands.inspect, ["--samples=9"]),
        (commands.trace, ["--step=1"]),
        (commands.trace, ["--step=1", "--json"]),
        (commands.trace, ["--source=a", "--document=1"]),
        (commands.trace, ["--source=a", "--document=1", "--json"]),
    ):
        assert command(program, tmp_path, config, *words) == 0
        shown = check_terminal(capsys)
        assert "in/" in shown
        if "--json" in words:
            record = json.loads(shown.splitlines()[0])
            file = record["documents"][0]["file"] if "documents" in record else record["file"]
            assert Path(file).name in names, "scripts get the name itself"
    with pytest.raises(DataError) as caught:
        documents_of(dataset, TraceConfig(file="a.json"))
    assert str(caught.value).isprintable()


def check_terminal(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed; no line of it has a control character or is a part of a name."""
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    for line in shown.split("\n"):
        assert line.isprintable() and not line.startswith(("\\u202e", "[bold]")), repr(line)
    return shown


def test_share_cut_counts_documents_that_lie_in_more_than_one_row(prepared: DataConfig) -> None:
    dataset = open_dataset(replace(prepared, row_tokens=64))
    for name, rows in zip(dataset.source_names, dataset.train, strict=True):
        split = len({
            rows.stream.document_at(r * 64) for r in range(1, rows.count)
            if rows.stream.document_span(rows.stream.document_at(r * 64))[0] != r * 64
        })  # fmt: skip
        begun = rows.stream.document_at(rows.count * 64 - 1) + 1
        if rows.count <= 64:
            assert inspect.share_cut(rows, packing="chunk") == pytest.approx(split / begun), name
    assert np.isfinite(inspect.lengths_of(dataset.train[0])).all()
