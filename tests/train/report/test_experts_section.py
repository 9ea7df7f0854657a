"""The report about expert layers: charts, numbers of the last reading, and damaged lines are left out."""

from pathlib import Path
from typing import Any

import pytest
from test_report import folder_of, step

from train.report.curves import charts_of
from train.report.experts import experts_section, is_reading
from train.report.facts import MOST_SAMPLES, describe, read_reported
from train.report.summary import read_run

LAYER = {
    "layer": 3,
    "load_max": 1.5,
    "load_min": 0.25,
    "entropy": 0.987,
    "dropped": 0.125,
    "bias_min": -0.01,
    "bias_max": 0.02,
}
LINE: dict[str, Any] = {"kind": "experts", "step": 1200, "layers": [LAYER]}


def test_a_layer_is_a_line_with_its_numbers() -> None:
    text = "\n".join(experts_section(LINE))
    assert "step 1,200" in text and "| 3 | 1.50 | 0.25 | 0.987 | 12.50% | -0.010 to +0.020 |" in text


@pytest.mark.parametrize(
    "damage",
    [{"layers": []}, {"layers": [LAYER | {"layer": "3"}]}, {"layers": [LAYER | {"dropped": None}]}, {"step": "x"}],
)
def test_damaged_lines_are_no_readings(damage: dict[str, Any]) -> None:
    assert is_reading(LINE) and not is_reading(LINE | damage)


def test_charts_show_the_mean_and_the_range_of_expert_layers(tmp_path: Path) -> None:
    second = LAYER | {"layer": 5, "load_max": 2.5, "dropped": 0.0}
    damaged = LINE | {"step": 1250, "layers": []}
    lines = [step(1200, 5.0), LINE, damaged, LINE | {"step": 1300, "layers": [LAYER, second]}]
    record = read_run(folder_of(tmp_path, lines))
    charts = {chart.title: chart.as_json()["runs"][0] for chart in charts_of([record])["Experts"]}
    (busiest,) = charts["Load of the busiest expert"]
    assert (busiest["steps"], busiest["values"]) == ([1200, 1300], [1.5, 2.0])
    assert (busiest["low"], busiest["high"]) == ([1.5, 1.5], [1.5, 2.5])
    assert charts["Dropped choices"][0]["values"] == [12.5, 6.25]
    assert [curve["label"] for curve in charts["Bias of the router"]] == ["min", "max"]
    assert [chart.title for chart in charts_of([record])["Experts"]][2] == "Entropy of the load"


def test_answers_from_the_beginning_and_the_end_of_a_run_are_shown(tmp_path: Path) -> None:
    samples = [
        {"kind": "rollout_samples", "step": number, "samples": [{"answer": f"text {number}"}]}
        for number in range(1, 101)
    ]
    titles = [
        sample["title"] for sample in describe(read_reported(folder_of(tmp_path, [step(1, 5.0), *samples])))["samples"]
    ]
    assert titles[0] == "step 1" and titles[-1] == "step 100" and len(titles) == MOST_SAMPLES
