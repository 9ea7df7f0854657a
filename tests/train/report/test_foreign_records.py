"""A run's record that is damaged or foreign: reports and status use what is readable; no text in it has an effect in Markdown,
on a terminal or in matplotlib."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mutations import check_reader, mutants, mutated_value
from test_report import LINES, RECIPE, folder_of

from launch.runs import RunFolder
from recipes.schema.checkpoint_steps import lost_run
from recipes.schema.errors import StratumError
from recipes.schema.run_folder import METRICS
from train.record.displays import Screen
from train.report import summary as report

READING = {
    "layer": 2, "linear": "mixer.in_proj", "operand": "input", "format": "e4m3", "snr_db": 30.0, "amax": 1.0, "saturated": 0.0,
    "underflowed": 0.25, "floor_db": 20.0, "is_healthy": True,
}  # fmt: skip
RECORD = [*LINES, {"kind": "precision", "step": 8, "scaling": "current", "readings": [READING]}]
EVIL = "<script>alert(1)</script> | `a` **b** $x_{$ \x1b[2J\nnew [c](http://d)"


def text_of(lines: list[Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def mutated_records(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        lines: Any = list(RECORD)
        for _ in range(rng.choice((1, 3, 10))):
            at = rng.randrange(len(lines))
            lines[at] = mutated_value(lines[at], rng)
        yield f"record {seed}/{number}", text_of(lines)


def read_record(path: Path) -> None:
    run = RunFolder(path.parent)
    run.progress()
    run.longest_stop_s()
    lost_run(path.parent)
    record = report.read_run(path.parent)
    report.summary(record, RECIPE, name="run", sample=None)


@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.slow)], ids=["few", "many"])
def test_a_damaged_or_hostile_record_is_contained(count: int, tmp_path: Path) -> None:
    folder_of(tmp_path, RECORD)
    check_reader(read_record, {METRICS: mutated_records(count, 1)}, folder=tmp_path)
    check_reader(read_record, {METRICS: mutants(text_of(RECORD), count=count, seed=2)}, folder=tmp_path)


def test_markup_and_escape_codes_in_names_have_no_effect_in_summary_and_pictures(tmp_path: Path) -> None:
    lines = json.loads(json.dumps(RECORD).replace('"verse"', json.dumps(EVIL)))
    for line in lines:
        line |= {key: EVIL for key in ("layout", "device", "cpu", "scaling", "torch") if key in line}
    lines[-1]["readings"][0] |= {"linear": EVIL, "format": EVIL}
    folder = tmp_path / "a_$x_{$<script>"
    folder.mkdir()
    folder_of(folder, lines)
    recipe = RECIPE | {"model": {"pattern": f"M|-{EVIL}", "hidden": 8}}
    recipe |= {"run": {"steps": 8, "start_from": EVIL}, "objective": {"kind": "distill", "teacher": EVIL}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    report.write_report(folder, sample="```\n<script>\n\x1b[2J")
    text = (folder / "summary.md").read_text()
    before, sample = text.split("## Sample")
    shown = before.replace("# Run `a_$x_{$<script>`", "", 1)  # inside a code span nothing is markup
    assert "<script" not in shown and "\x1b" not in text and "**" not in shown and "](http" not in shown
    assert sample.startswith("\n\n````\n")
    columns = [line.count("|") for line in shown.splitlines() if line.startswith("|")]
    assert set(columns) <= {3, 4, 9}, "no table has a cell more than it should"
    assert (folder / "loss.png").is_file() and (folder / "precision.png").is_file()


def test_escape_codes_in_names_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(8, 0, live=False)
    screen.write([{"kind": "evaluation", "step": 0, "bits_per_byte": {EVIL: 1.0}}, {"kind": "warning", "text": EVIL}])
    screen.close()
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b'{"kind": "step", "step": 1' + b"0" * 5000 + b"}\n"])
def test_a_record_of_something_else_is_a_run_without_steps(content: bytes, tmp_path: Path) -> None:
    folder_of(tmp_path, [])
    (tmp_path / METRICS).write_bytes(content)
    assert RunFolder(tmp_path).progress() is None
    assert "No step is finished yet" in report.summary(report.read_run(tmp_path), RECIPE, name="x", sample=None)


def test_a_pipe_as_record_is_refused_at_once(tmp_path: Path) -> None:

    folder_of(tmp_path, [])
    (tmp_path / METRICS).unlink()
    os.mkfifo(tmp_path / METRICS)
    with pytest.raises((StratumError, OSError)):
        report.read_run(tmp_path)
