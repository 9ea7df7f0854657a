"""Where the time of a step goes: laps by name, wall-clock seconds. Standard library only."""

import time


class Stopwatch:
    """Started when made; `lap(name)` books the time since the last lap (or the start) under `name`."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`, adding to what is there."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by lap name so far."""
        return dict(self._laps)
