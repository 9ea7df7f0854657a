"""Where the wall time of a run went, from its metrics.jsonl, across all its starts.

    lines --time_spent--> stretches of time by kind --totals--> seconds by kind; goodput = training / all

Every second between the first and the last line belongs to one kind:

    training                    steps whose result counts
    repeated steps              steps that were run again later, because the run lost them
    waiting for data            the part of a step before its rows arrived
    evaluating, saving, ...     phases that the trainer records by name
    other work                  between these: loading, writing records
    stopped or starting         from the last line of one process to the first of the next: the failure, the queue, imports;
                                also a step that was lost before its end
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recipes.schema.run_folder import Line, as_number

TRAINING, REPEATED, DATA, OTHER, STOPPED = (
    "training",
    "repeated steps",
    "waiting for data",
    "other work",
    "stopped or starting",
)


@dataclass(frozen=True)
class Stretch:
    """Time from `start` to `end`, in seconds of the system's clock."""

    start: float
    end: float
    kind: str


def time_spent(lines: Iterable[Line]) -> list[Stretch]:
    """All stretches in order, without gaps; neighbours differ in kind. Lines without a time are left out."""
    timed = sorted((line for line in lines if 0 < as_number(line.get("time")) < 1e11), key=lambda line: line["time"])
    left = Counter(line["step"] for line in timed if _is_step(line))
    found: list[Stretch] = []
    for line in timed:
        if not found:
            found.append(Stretch(line["time"], line["time"], OTHER))
        elif line["kind"] == "machine":
            _extend(found, line["time"], STOPPED)
        elif _is_step(line):
            parts = line["seconds"] if isinstance(line.get("seconds"), dict) else {}
            left[line["step"]] -= 1
            is_lost = left[line["step"]] > 0
            start = line["time"] - _seconds(math.fsum(map(as_number, parts.values())))
            _extend(found, start, OTHER)
            _extend(found, min(line["time"], start + _seconds(parts.get("data"))), REPEATED if is_lost else DATA)
            _extend(found, line["time"], REPEATED if is_lost else TRAINING)
        elif line["kind"] == "phase" and isinstance(line.get("name"), str):
            _extend(found, line["time"] - _seconds(line.get("seconds")), OTHER)
            _extend(found, line["time"], line["name"])
    if timed:
        _extend(found, timed[-1]["time"], OTHER)
    return [stretch for stretch in found if stretch.end > stretch.start]


def totals(stretches: Sequence[Stretch]) -> dict[str, float]:
    """Seconds by kind, the longest first."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for stretch in stretches:
        seconds[stretch.kind] += stretch.end - stretch.start
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def goodput(seconds: dict[str, float]) -> float:
    """Share of the time in `training`; 0 without any time."""
    whole = sum(seconds.values())
    return seconds.get(TRAINING, 0.0) / whole if whole else 0.0


class RunningGoodput:
    """Goodput up to the last line of a run, for a record that is still being written. A step that runs again replaces itself."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._last = 0.0
        self._training: dict[int, float] = {}
        self._total = 0.0

    def add(self, line: Line) -> None:
        """The next line. Lines without a time are left out."""
        now = as_number(line.get("time"))
        if not 0 < now < 1e11:
            return
        if self._first is None:
            self._first = self._last = now
        if _is_step(line):
            parts = line["seconds"] if isinstance(line.get("seconds"), dict) else {}
            start = now - _seconds(math.fsum(map(as_number, parts.values())))
            begin = max(self._last, min(now, start + _seconds(parts.get("data"))))
            self._total += max(0.0, now - begin) - self._training.get(line["step"], 0.0)
            self._training[line["step"]] = max(0.0, now - begin)
        self._last = max(self._last, now)

    @property
    def value(self) -> float:
        """Share of the time so far in steps whose result counts; 0 before any time has passed."""
        whole = self._last - (self._first or 0.0)
        return self._total / whole if whole > 0 else 0.0


def _is_step(line: Line) -> bool:
    return line["kind"] in ("step", "unreduced_step") and type(line.get("step")) is int


def _seconds(value: object) -> float:
    number = as_number(value)
    return number if 0 < number < 1e9 else 0.0


def _extend(found: list[Stretch], end: float, kind: str) -> None:
    """Add the time from the last stretch's end to `end`; nothing if that is in the past, because clocks can be set back."""
    last = found[-1]
    if end <= last.end:
        return
    if last.kind == kind:
        found[-1] = Stretch(last.start, end, kind)
    else:
        found.append(Stretch(last.end, end, kind))
