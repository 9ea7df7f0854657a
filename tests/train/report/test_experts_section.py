"""The section of summary.md about expert layers: numbers of the last reading, and damaged lines are left out."""

from typing import Any

import pytest

from train.report.experts import experts_section, is_reading

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
