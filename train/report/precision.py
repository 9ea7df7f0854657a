"""Text and picture of a run's quantisation errors, made from the precision lines of its metrics.jsonl.

lines of kind "precision" --> precision.png (each operand's signal over noise, now and over time), a section of summary.md
"""

import math
from pathlib import Path
from typing import Any

from data.system.figure import MUTED, canvas
from recipes.schema.foreign import in_markdown, printable
from recipes.schema.run_folder import as_number

Line = dict[str, Any]

_ORDER = ("input", "weight", "grad", "input_for_weight_grad", "grad_for_weight_grad")
_SHORT = {"input_for_weight_grad": "input\n(weight grad)", "grad_for_weight_grad": "grad\n(weight grad)"}
_COLORS = ("#2b6cb0", "#2f9e44", "#d9480f", "#0b7285", "#9c36b5")


def is_measurement(line: Line) -> bool:
    """Whether a line has the fields of a measurement. The file may be damaged or come from another program."""
    readings = line.get("readings")
    if not isinstance(readings, list) or not readings or not {"step", "scaling"} <= line.keys():
        return False
    return all(
        isinstance(reading, dict)
        and type(reading.get("layer")) is int
        and all(isinstance(reading.get(key), str) for key in ("linear", "operand", "format"))
        and all(key in reading for key in ("snr_db", "amax", "saturated", "underflowed", "floor_db"))
        for reading in readings
    )


def in_picture(text: str) -> str:
    """A name in a picture: matplotlib would read `$...$` as a formula, and refuse a wrong one."""
    return printable(text, most=80).replace("$", r"\$")


def draw_precision(lines: list[Line], path: Path, *, title: str) -> None:
    """Left: signal over noise of every operand of every low-precision layer at the last measured step. Right: over time, the
    lowest value of each operand, and the largest share of numbers that became zero."""
    last = lines[-1]
    operands = _operands(lines)
    layers = list(dict.fromkeys((r["layer"], r["linear"]) for r in last["readings"]))
    table = {(r["layer"], r["linear"], r["operand"]): r for r in last["readings"]}
    values = [
        [_snr(table[layer, linear, name]) if (layer, linear, name) in table else math.nan for name in operands]
        for layer, linear in layers
    ]
    floor = min(as_number(r["floor_db"]) for r in last["readings"])
    height = max(4.6, 1.6 + 0.22 * len(layers))
    with canvas(path, size=(11, height)) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1))
        left = figure.add_subplot(grid[:, 0])
        image = left.imshow(values, aspect="auto", cmap="RdYlGn", vmin=floor - 5, vmax=40)
        left.set_xticks(range(len(operands)), [_SHORT.get(name, name) for name in operands], fontsize=8)
        left.set_yticks(
            range(len(layers)), [in_picture(f"{layer} {linear.split('.')[-1]}") for layer, linear in layers], fontsize=7
        )
        left.set_title(f"{title}: {in_picture(last['scaling'])}, step {last['step']:,}")
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                if math.isfinite(value) and len(layers) <= 60:
                    left.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6.5)
        figure.colorbar(image, ax=left, label="signal over quantisation noise, dB", shrink=0.8)

        above, below = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
        for color, name in zip(_COLORS, operands, strict=False):
            steps, lowest, underflow = [], [], []
            for line in lines:
                mine = [r for r in line["readings"] if r["operand"] == name]
                if mine:
                    steps.append(line["step"])
                    lowest.append(min(_snr(r) for r in mine))
                    underflow.append(100 * max(as_number(r["underflowed"]) for r in mine))
            above.plot(steps, lowest, color=color, label=name.replace("_", " "), marker=".")
            below.plot(steps, underflow, color=color, marker=".")
        for value, style in sorted({(as_number(r["floor_db"]), ":") for r in last["readings"]}):
            above.axhline(value, color=MUTED, linestyle=style, linewidth=1)
        above.set(ylabel="lowest of any layer, dB")
        above.set_title("Signal over noise (dotted: lower limit)")
        above.legend(fontsize=7)
        below.set(xlabel="step", ylabel="most of any layer, %", ylim=(0, None))
        below.set_title("Numbers that became zero")
        for axes in (above, below):
            axes.grid(visible=True)


def precision_section(lines: list[Line]) -> list[str]:
    """Markdown: the operands with the lowest signal over noise at the last measured step, and when any was below its limit."""
    last = lines[-1]
    worst = sorted(last["readings"], key=_snr)[:5]
    unhealthy_steps = [
        line["step"] for line in lines if any(_snr(r) < as_number(r["floor_db"]) for r in line["readings"])
    ]
    text = (
        "Every measured operand stayed above its lower limit."
        if not unhealthy_steps
        else (
            f"At {len(unhealthy_steps)} of {len(lines)} measured steps an operand was below its lower limit, first at step "
            f"{unhealthy_steps[0]:,}."
        )
    )
    return [
        "",
        "## Low precision",
        "",
        f"{in_markdown(last['scaling'])}. {text} The lowest at step {last['step']:,}:",
        "",
        "| layer | linear | operand | format | signal over noise, dB | largest magnitude | saturated | became zero |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['layer']} | {in_markdown(r['linear'])} | {in_markdown(r['operand'].replace('_', ' '))} | "
            f"{in_markdown(r['format'])} | {_snr(r):.1f} | "
            f"{as_number(r['amax']):.3g} | {as_number(r['saturated']):.2%} | {as_number(r['underflowed']):.2%} |"
            for r in worst
        ),
        "",
        "![signal over noise of every low-precision operand](precision.png)",
    ]


def operand_order(reading: dict[str, Any]) -> int:
    """Place of a reading's operand in tables."""
    return _ORDER.index(reading["operand"]) if reading["operand"] in _ORDER else len(_ORDER)


def _operands(lines: list[Line]) -> list[str]:
    found = {r["operand"] for line in lines for r in line["readings"]}
    return [name for name in _ORDER if name in found]


def _snr(reading: Line) -> float:
    """Decibels; infinite if quantisation was exact."""
    return math.inf if reading["snr_db"] is None else as_number(reading["snr_db"])
