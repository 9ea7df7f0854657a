"""Sends the record of a run to one tracker, in a thread of its own: a tracker that fails or hangs does not delay a step.

The truth is metrics.jsonl. At each start the follower asks the tracker for the last step it has, sends the rows up to the
resumed step that a crash has kept from it, and leaves out the steps that it has already: they run again with the same numbers. If
the recipe or the data has changed since, or the run goes back because of a spike (run.spikes.policy=rollback), their numbers
differ; the tracker then gets a new run in the same group, with everything from step 0.
"""

import itertools
import json
import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.system import disk
from launch.starts import starts_of
from recipes.schema.changes import differences
from recipes.schema.foreign import read_json
from recipes.schema.run_folder import METRICS, Line, read_metrics
from train.record.trackers.rows import Rows
from train.record.trackers.tracker import TrackedRun, Tracker

STATE = "trackers"
"""Folder in a run's folder: one file for each tracker, with the identity of the run there."""
HANG_S = 300.0
"""A tracker that has not taken a row for this long is switched off."""
CLOSE_S = 90.0
"""Longest wait for a tracker at the end of a run. W&B itself stops waiting after 60 s."""
_ROWS_AT_ONCE = 200


@dataclass(frozen=True)
class State:
    """What the run's folder remembers of a tracker."""

    identity: str
    part: int
    recipe: dict[str, Any]
    data: str


class Follower:
    """A display (`train.record.displays.Display`) that passes lines to the thread of its tracker."""

    def __init__(
        self,
        name: str,
        make: Callable[[TrackedRun], Tracker],
        *,
        folder: Path,
        first_step: int,
        recipe: dict[str, Any],
        data: str,
        hang_s: float = HANG_S,
        close_s: float = CLOSE_S,
    ) -> None:
        """first_step: steps finished before this start. data: identity of the prepared data. Create it before this start writes
        its first line: earlier lines are read from metrics.jsonl."""
        self.name = name
        self._make, self._folder, self._first_step = make, folder, first_step
        self._recipe, self._data = recipe, data
        self._hang_s, self._close_s = hang_s, close_s
        path = folder / METRICS
        self._earlier_bytes = path.stat().st_size if path.is_file() else 0
        self._lines: queue.SimpleQueue[list[Line] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._waits_since: float | None = None
        """Since when the thread has had lines and has not finished with them."""
        self._thread = threading.Thread(target=self._follow, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, lines: list[Line]) -> None:
        """Hand lines over. Raises what the tracker raised, or TimeoutError if it hangs."""
        self._check()
        if self._waits_since is None:
            self._waits_since = time.monotonic()
        elif time.monotonic() - self._waits_since > self._hang_s:
            raise TimeoutError(f"it has not answered for {self._hang_s:g} s. {_LATER}")
        self._lines.put([dict(line) for line in lines])

    def close(self) -> None:
        """Wait for the tracker, but not for ever."""
        self._lines.put(None)
        self._thread.join(self._close_s)
        self._check()
        if self._thread.is_alive():
            raise TimeoutError(f"it did not take the last points within {self._close_s:g} s. {_LATER}")

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _follow(self) -> None:
        try:
            tracker = self._open()
            rows = Rows(last_sent=tracker.last_step, first_step=self._first_step)
            rows.earlier(self._earlier())
            while (lines := self._lines.get()) is not None:
                back = next((line for line in lines if line["kind"] == "rollback"), None)
                if back is not None and not rows.go_back(back["to_step"]):
                    tracker.close()
                    tracker = self._next_part()
                    rows = Rows(last_sent=tracker.last_step, first_step=back["to_step"])
                    rows.earlier(self._before(back))
                rows.add(lines)
                self._send(tracker, rows)
                if self._lines.empty():
                    self._waits_since = None
            self._send(tracker, rows, is_end=True)
            tracker.close()
        except Exception as error:
            self._error = error

    def _send(self, tracker: Tracker, rows: Rows, *, is_end: bool = False) -> None:
        ready = rows.complete(is_end=is_end)
        for start in range(0, len(ready), _ROWS_AT_ONCE):
            tracker.send(ready[start : start + _ROWS_AT_ONCE])
            if self._waits_since is not None:  # a long history takes time, but the tracker does answer
                self._waits_since = time.monotonic()

    def _open(self) -> Tracker:
        """The run at the tracker: the one of the last start, or a new part if that has steps which now run with other numbers."""
        before = read_state(self._folder, self.name)
        if before is not None and before.recipe.get("run", {}).get("name") != self._recipe.get("run", {}).get("name"):
            before = None  # a copy of another run's folder must not write into that run
        state = before or State(uuid.uuid4().hex[:12], 1, self._recipe, self._data)
        tracker = self._opened(state)
        if before is not None and tracker.last_step > self._first_step and self._has_changed(before):
            tracker.close()
            state = replace(state, part=state.part + 1)
            tracker = self._opened(replace(state, recipe=self._recipe, data=self._data))
        else:
            write_state(self._folder, self.name, replace(state, recipe=self._recipe, data=self._data))
        return tracker

    def _opened(self, state: State) -> Tracker:
        write_state(self._folder, self.name, state)  # first, so that no kill leaves a run that nobody finds again
        return self._make(TrackedRun(self._folder, state.identity, state.part, self._recipe))

    def _next_part(self) -> Tracker:
        state = read_state(self._folder, self.name) or State(uuid.uuid4().hex[:12], 0, self._recipe, self._data)
        return self._opened(replace(state, part=state.part + 1))

    def _before(self, back: Line) -> list[Line]:
        """The lines of metrics.jsonl up to the one that says that the run went back."""
        lines = read_metrics(self._folder / METRICS)
        return list(
            itertools.takewhile(lambda line: (line["kind"], line.get("time")) != ("rollback", back["time"]), lines)
        )

    def _has_changed(self, before: State) -> bool:
        return before.data != self._data or any(
            change.kind != "safe" for change in differences(before.recipe, self._recipe)
        )

    def _earlier(self) -> list[Line]:
        path = self._folder / METRICS
        first = starts_of(self._folder)[:1]  # when the run's time began
        return [*first, *(read_metrics(path, first_bytes=self._earlier_bytes) if self._earlier_bytes else [])]


_LATER = "The next start of the run sends what is missing."


def read_state(folder: Path, name: str) -> State | None:
    """What the run's folder remembers of a tracker; None if nothing, or if the file is damaged."""
    try:
        found = read_json(_file(folder, name), most_bytes=1 << 24)
        state = State(found["identity"], found["part"], found["recipe"], found["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_right = (type(state.identity), type(state.part), type(state.recipe), type(state.data)) == (str, int, dict, str)
    return state if is_right and state.identity.isalnum() else None


def write_state(folder: Path, name: str, state: State) -> None:
    path = _file(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"identity": state.identity, "part": state.part, "data": state.data, "recipe": state.recipe}
    disk.write_text(path, json.dumps(fields, indent=1) + "\n")


def _file(folder: Path, name: str) -> Path:
    return folder / STATE / f"{name.lower().replace(' & ', '_and_').replace(' ', '_')}.json"
