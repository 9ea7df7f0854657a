"""Where the wall time of a run went, across all its starts, from its metrics.jsonl and its launchers' record (launch.starts).

    lines --time_spent--> stretches of time by kind --totals--> seconds by kind; goodput = training / all

Every second between the first and the last event belongs to one kind:

    training                    steps whose result counts
    lost work                   steps that were run again later, and the step that a failure ended
    waiting for data            the part of a step before its rows arrived
    waiting for copies          the part of a step that waits for a save or a copy in memory
    evaluating, saving, ...     phases that the trainer records by name
    detecting a failure         from a failure to the end of all processes; a hang begins `launch.timeout_s` before its error
    queue or back-off           from the end of the processes, or the submission of a job, to the next processes
    starting                    the launcher, imports, process groups, model: until the state is loaded
    loading                     the state, from a checkpoint or from copies in memory
    other work                  between these: writing records, ending
    stopped                     no launcher was running. Without a launcher's record also detection and queue
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recipes.schema.run_folder import Line, as_number

TRAINING, LOST, DATA, COPIES, DETECTING, QUEUE, STARTING, LOADING, OTHER, STOPPED = (
    "training",
    "lost work",
    "waiting for data",
    "waiting for copies",
    "detecting a failure",
    "queue or back-off",
    "starting",
    "loading",
    "other work",
    "stopped",
)
_PARTS = {"data": DATA, "staging": COPIES}
"""Parts of a step that are not training."""
_LAUNCHER = ("launch", "submission", "attempt", "attempt_end")


@dataclass(frozen=True)
class Stretch:
    """Time from `start` to `end`, in seconds of the system's clock."""

    start: float
    end: float
    kind: str


def time_spent(lines: Iterable[Line], starts: Iterable[Line] = ()) -> list[Stretch]:
    """All stretches in order, without gaps; neighbours differ in kind. Lines without a time are left out.

    lines: of metrics.jsonl. starts: of the launcher's record.
    """
    timed = sorted((line for line in (*starts, *lines) if is_timed(line)), key=lambda line: line["time"])
    left = Counter(line["step"] for line in timed if _is_step(line))
    found: list[Stretch] = []
    before = ""
    for line in timed:
        if not found:
            found.append(Stretch(line["time"], line["time"], OTHER))
        if _is_step(line):
            left[line["step"]] -= 1
            for end, kind in _pieces(line):
                is_lost = left[line["step"]] > 0 and kind != OTHER
                _extend(found, end, LOST if is_lost else kind)
        elif line["kind"] == "phase" and isinstance(line.get("name"), str):
            _extend(found, line["time"] - _seconds(line.get("seconds")), OTHER)
            _extend(found, line["time"], line["name"])
        elif line["kind"] == "machine" or line["kind"] in _LAUNCHER:
            for end, kind in _around(line, before):
                _extend(found, end, kind)
        before = line["kind"]
    if timed:
        _extend(found, timed[-1]["time"], OTHER)
    return [stretch for stretch in found if stretch.end > stretch.start]


def is_timed(line: Line) -> bool:
    """Whether a line has a time of the system's clock."""
    return 0 < as_number(line.get("time")) < 1e11


def _pieces(line: Line) -> list[tuple[float, str]]:
    """(end, kind) of what a step's line says, in order: the time before the step, then its parts."""
    parts = line["seconds"] if isinstance(line.get("seconds"), dict) else {}
    seconds = [(_PARTS.get(name, TRAINING), _seconds(value)) for name, value in parts.items()]
    now: float = line["time"] - math.fsum(value for _, value in seconds)
    pieces = [(now, OTHER)]
    for kind, value in seconds:
        now += value
        pieces.append((min(now, line["time"]), kind))
    return pieces


def _around(line: Line, before: str) -> list[tuple[float, str]]:
    """(end, kind) of the time before a start or an end of processes, in order. before: kind of the event before it."""
    now: float = line["time"]
    match line["kind"]:
        case "launch" | "submission":
            return [(now, STOPPED)]
        case "attempt":
            return [(now, {"attempt_end": QUEUE, "submission": QUEUE, "launch": STARTING}.get(before, STOPPED))]
        case "attempt_end":
            if before == "attempt":
                return [(now, STARTING)]
            failed = as_number(line.get("failed"))
            return [(min(failed, now), LOST), (now, DETECTING)] if failed > 0 else [(now, OTHER)]
    started, load = _seconds(line.get("started_s")), _seconds(line.get("load_s"))
    first = STARTING if before == "attempt" else STOPPED
    return [(now - max(started, load), first), (now - load, STARTING), (now, LOADING)]


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
        """The next line of metrics.jsonl or of the launcher's record, in order of time. Lines without a time are left out."""
        if not is_timed(line):
            return
        now: float = line["time"]
        if self._first is None:
            self._first = self._last = now
        if _is_step(line):
            seconds = 0.0
            for end, kind in _pieces(line):
                seconds += max(0.0, end - self._last) if kind == TRAINING else 0.0
                self._last = max(self._last, end)
            self._total += seconds - self._training.get(line["step"], 0.0)
            self._training[line["step"]] = seconds
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
