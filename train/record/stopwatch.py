"""Where the time of a step goes: laps by name, in seconds; on a GPU by events in its stream, so that a lap is the device's.

The host runs ahead of a GPU: by its own clock, the time of the forward pass would appear wherever the host next waits. Marking
an event waits for nothing; events are read when someone asks for `seconds`, at the logging interval.
"""

import time

import torch


class Stopwatch:
    """Started when made; `lap(name)` books the time since the last lap (or the start) under `name`."""

    def __init__(self, device: torch.device | None = None) -> None:
        """device: whose work is timed; None: the host's."""
        self._is_on_gpu = device is not None and device.type == "cuda"
        self._start = self._mark()
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`, adding to what is there. Never waits."""
        self._laps.append((name, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds by lap name so far. Waits until a GPU has come to the last lap."""
        found: dict[str, float] = {}
        last = self._start
        for name, mark in self._laps:
            found[name] = found.get(name, 0.0) + _between(last, mark)
            last = mark
        return found

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._is_on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert not isinstance(start, float) and not isinstance(end, float)
    end.synchronize()
    return start.elapsed_time(end) / 1000  # milliseconds
