"""Rows for trackers: all numbers that a run recorded for one step, collected from the lines of metrics.jsonl.

    {"kind": "step", "step": 12, "loss": 3.1, ...}, {"kind": "evaluation", "step": 12, ...} --> Row(12, time, {"train/loss": ...})

A row is complete when the line of a later step is written: whatever belongs to a step is recorded before it. Only complete rows
are sent, so a tracker has all of a step or nothing of it. That is why the last step it has says what is missing.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from launch.time_spent import RunningGoodput
from recipes.schema.run_folder import Line, as_number

_OF_STEPS = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "step_s", "mfu", "memory_bytes", "tokens", "labels")


@dataclass
class Row:
    """The numbers of one step, by name. time: seconds of the system's clock."""

    step: int
    time: float
    scalars: dict[str, float] = field(default_factory=dict)


class Rows:
    """Collects lines into rows, oldest step first; each step leaves it once, when it is complete."""

    def __init__(self, *, last_sent: int, first_step: int) -> None:
        """last_sent: the last step that the tracker has; -1 without one. first_step: steps finished before this start."""
        self._last_sent = last_sent
        self._newest = first_step
        self._waiting: dict[int, Row] = {}
        self._goodput = RunningGoodput()

    def earlier(self, lines: Iterable[Line]) -> None:
        """Lines of earlier starts. Steps after `first_step` are left out, because this start runs them again. So are lines that a
        trainer did not write."""
        for line in lines:
            with suppress(KeyError, TypeError, AttributeError):
                self._add(line, most_step=self._newest)

    def add(self, lines: Iterable[Line]) -> None:
        """Lines of this start."""
        for line in lines:
            self._add(line, most_step=None)
            if line["kind"] == "step":
                self._newest = max(self._newest, line["step"])

    def go_back(self, step: int) -> bool:
        """The run has gone back to `step` in this start. -> False if later steps, which are undone, have been sent already."""
        self._waiting = {at: row for at, row in self._waiting.items() if at <= step}
        self._newest = step
        return self._last_sent <= step

    def complete(self, *, is_end: bool = False) -> list[Row]:
        """Rows that no later line can change. is_end: no line follows, so the newest step's row is complete too."""
        limit = self._newest if is_end else self._newest - 1
        ready = [self._waiting.pop(step) for step in sorted(self._waiting) if step <= limit]
        self._last_sent = max([self._last_sent, *(row.step for row in ready)])
        return ready

    def _add(self, line: Line, *, most_step: int | None) -> None:
        self._goodput.add(line)
        step = line.get("step")
        if type(step) is not int or step <= self._last_sent or (most_step is not None and step > most_step):
            return
        if not (scalars := scalars_of(line)):
            return
        row = self._waiting.setdefault(step, Row(step, 0.0))
        row.time = as_number(line.get("time"))
        row.scalars |= scalars
        if line["kind"] == "step":
            row.scalars["time/goodput"] = self._goodput.value


def scalars_of(line: Line) -> dict[str, float]:
    """The numbers of a line to draw as curves, by name."""
    match line["kind"]:
        case "step":
            numbers = {f"train/{name}": line[name] for name in _OF_STEPS if name in line}
            numbers |= {f"train/{name}": value for name, value in line.get("loss_parts", {}).items()}
            return numbers | {f"seconds/{name}": value for name, value in line["seconds"].items()}
        case "evaluation":
            return {f"heldout_bits_per_byte/{name}": value for name, value in line["bits_per_byte"].items()}
        case "tasks":
            return {
                f"tasks/{task}/{name}": metric["value"]
                for task, entry in line["tasks"].items()
                for name, metric in entry["metrics"].items()
            }
        case "rollouts":
            return {
                f"rollouts/{name}": float(value)
                for name, value in line.items()
                if name not in ("step", "time") and type(value) in (int, float)
            }
        case "precision":
            lowest: dict[str, float] = {}
            for reading in line["readings"]:
                if reading["snr_db"] is not None:
                    name = f"precision/lowest_snr_db/{reading['operand']}"
                    lowest[name] = min(reading["snr_db"], lowest.get(name, math.inf))
            return lowest
        case _:
            return {}
