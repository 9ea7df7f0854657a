"""Trackio: an SQLite file on this machine (in $TRACKIO_DIR), a Hugging Face Space or an own server, as its settings say.

Trackio writes in the background, and a killed process loses up to half a second. Its store says which step the run has. It only
prints a warning when it cannot write, so the end of the run looks into the store.
"""

import contextlib
import io
from collections.abc import Sequence

from train.record.trackers.rows import Row
from train.record.trackers.tracker import TrackedRun


class Trackio:
    """A run at Trackio."""

    def __init__(self, run: TrackedRun, *, project: str) -> None:
        import trackio  # optional package

        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to start its dashboard
            self._run = trackio.init(
                project,
                name=f"{run.name}-{run.identity[:6]}",  # Trackio finds runs by name
                group=run.group,
                config=run.recipe,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        # Not public, but the only place that knows it for a file, a Space and a server alike; pyproject.toml pins the version.
        self.last_step = self._sent = self._run._next_step - 1

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(row.scalars, step=row.step)
            self._sent = row.step

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
        if self._run._is_local and (stored := self._stored()) < self._sent:
            raise OSError(
                f"its store has no step after {stored}, of {self._sent} that were sent; its own warnings say why"
            )

    def _stored(self) -> int:
        from trackio.sqlite_storage import SQLiteStorage  # optional package

        found = SQLiteStorage.get_max_step_for_run(self._run.project, self._run.name, run_id=self._run.id)
        return -1 if found is None else found
