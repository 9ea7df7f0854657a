"""Time of each part of a step: named laps, in seconds. On a GPU they are measured by events in its stream.

The host runs ahead of a GPU, so host time would assign the forward pass to the next place where the host waits. Recording an
event does not wait; events are read only by `seconds`, at the logging interval.
"""

import time

import torch


class Stopwatch:
    """Starts when it is created; `lap(name)` adds the time since the last lap (or the start) to `name`."""

    def __init__(self, device: torch.device | None = None) -> None:
        """device: the device whose work is timed; None: the host."""
        self._is_on_gpu = device is not None and device.type == "cuda"
        self._start = self._mark()
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`. Never waits."""
        self._laps.append((name, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds by lap name so far. Waits until a GPU has reached the last lap."""
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
