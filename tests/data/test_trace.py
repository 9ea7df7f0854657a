"""Provenance both ways against the texts themselves, and the commands that show it."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from data import commands, inspect, trace
from data.dataset import open_dataset
from data.trace import documents_of, pieces_of
from recipes.schema.data import DataConfig
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
    with pytest.raises(DataError, match="say what to trace: --step N, --file NAME"):
        documents_of(dataset, TraceConfig(source="verse"))
    with pytest.raises(DataError, match=r"--source vers: the recipe has code, verse"):
        documents_of(dataset, TraceConfig(source="vers", document=1))
    with pytest.raises(DataError, match=r"no document came from 0x.txt. Did you mean"):
        documents_of(dataset, TraceConfig(file="0x.txt"))
    held = dataset.origin(dataset.heldout[0].stream, 0)
    with pytest.raises(DataError, match="is held out: it is evaluated on and never trained on"):
        documents_of(dataset, TraceConfig(file=held.file, record=held.record))


def command(program, tmp_path: Path, config: DataConfig, *words: str) -> int:
    """Run a command over a recipe of its own, as from a shell."""
    from dataclasses import asdict

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
