"""The report of `stratum doctor --qualify`: Markdown to read, JSON to send."""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from recipes.schema import units

if TYPE_CHECKING:
    from launch.doctor.pieces import Options, Result


class Reporter:
    """Writes report.md and report.json in the options' folder, and says on stderr what runs."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._started = time.time()

    def begin(self, result: Result) -> None:
        """Announce a piece."""
        sys.stderr.write(f"{time.time() - self._started:6.0f} s  {result.name} ...\n")

    def write(self, results: list[Result]) -> None:
        """Replace both reports by the state of all pieces."""
        seconds = time.time() - self._started
        facts = {
            "machine": platform.node(),
            "gpus": self._options.gpus,
            "rehearsal": self._options.rehearse,
            "missing": list(self._options.missing),
            "started": self._started,
            "seconds": seconds,
        }
        both = facts | {"pieces": [asdict(result) for result in results]}
        (self._options.folder / "report.json").write_text(json.dumps(both, indent=1) + "\n")
        (self._options.folder / "report.md").write_text(markdown(self._options, results, seconds))


def markdown(options: Options, results: list[Result], seconds: float) -> str:
    """The report as Markdown: what passed, steps beside their plan, the ends of what failed."""
    counts = {
        state: sum(result.state == state for result in results) for state in dict.fromkeys(r.state for r in results)
    }
    lines = [
        f"# {'Rehearsal on a CPU' if options.rehearse else f'{options.gpus} GPU(s)'}: "
        + ", ".join(f"{count} {state}" for state, count in counts.items()),
        "",
        f"{seconds / 60:.1f} of {options.budget_minutes:g} minutes."
        + (f" Not installed: {', '.join(options.missing)}." if options.missing else ""),
        "",
        "| piece | result | seconds | |",
        "|---|---|---|---|",
        *(f"| {one.name} | {one.state} | {one.seconds:.0f} | {_cell(one.reason)} |" for one in results),
    ]
    steps = [one for one in results if one.figures]
    if steps:
        lines += [
            "",
            "| step | backend | precision | tokens/s | planned | MFU | planned | memory | planned |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_step_line, steps),
        ]
        if options.rehearse:
            lines += ["", "Planned: for an H100; a rehearsal only shows that both columns are filled."]
    for one in results:
        if one.tail:
            lines += [
                "",
                f"## {one.name}: {one.state}, {one.reason}",
                "",
                f"`{one.command}`",
                "",
                "```",
                one.tail,
                "```",
            ]
    return "\n".join(lines) + "\n"


def _step_line(one: Result) -> str:
    found, plan = one.figures, one.planned
    cells = [
        one.name.removeprefix("step: "), found.get("backend", "-"), found.get("precision", "-"),
        _figure(found.get("tokens_per_s"), ",.0f"), _figure(plan.get("tokens_per_s_per_gpu"), ",.0f"),
        _figure(found.get("mfu"), ".1%"), _figure(plan.get("mfu"), ".1%"),
        units.gib(found["memory_bytes"]) if "memory_bytes" in found else "-",
        units.gib(plan["memory_gib_per_rank"] * units.GIB) if "memory_gib_per_rank" in plan else "-",
    ]  # fmt: skip
    return f"| {' | '.join(_cell(str(cell)) for cell in cells)} |"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
