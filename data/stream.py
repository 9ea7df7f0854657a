"""One data-parallel rank's microbatches of every step, read ahead by threads. Their content is a pure function of position.

    Stream(dataset, position=...)         microbatches, step by step

The state of a stream is one integer, the global position of its next step. (The manifest's hash identifies the data that
positions refer to.) A row's position does not depend on the number of ranks, the microbatch size or the threads that read
it. Tensor, pipeline and context ranks of one data-parallel rank pass the same `rank` and get the same rows.
"""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.batch import Batch
from data.dataset import Dataset, open_dataset
from data.system.closing import Closing
from recipes.schema.errors import DataError

__all__ = ("Dataset", "Stream", "open_dataset")
log = logging.getLogger(__name__)

_ROWS_PER_READ = 64
"""Rows read in one call, at most: one call for each microbatch would cost more."""


class Stream(Closing):
    """One data-parallel rank's microbatches of every step, from `position` on.

    Microbatch m of rank r has microbatch_rows rows from global position `position + (m ranks + r) microbatch_rows` on.
    Threads read ahead, and `next` raises their errors. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        position: int,
        global_rows: int,
        microbatch_rows: int,
        rank: int,
        ranks: int,
        prefetch_steps: int,
        pin: bool = False,
        threads: int = 1,
        stall_warning_s: float = 30.0,
        stall_limit_s: float = 480.0,
    ) -> None:
        assert global_rows % (microbatch_rows * ranks) == 0, "checked by the layout"
        self.position = position
        self._global_rows = global_rows
        self._microbatch_rows = microbatch_rows
        self._rank, self._ranks = rank, ranks
        self._dataset = dataset
        self._pin = pin
        self._ahead_rows = prefetch_steps * global_rows
        self._stall_warning_s, self._stall_limit_s = stall_warning_s, stall_limit_s
        self._changed = threading.Condition()
        self._next_read = position
        self._fetching = dataset.fetch_ahead(position)
        self._read: dict[int, list[Batch] | BaseException] = {}
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._read_ahead, name=f"rows-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self._global_rows * self._dataset.row_tokens

    @property
    def tokens(self) -> int:
        """Tokens of all steps so far."""
        return self.position * self._dataset.row_tokens

    def state(self) -> dict[str, Any]:
        """What a stream needs to continue in addition to its position: nothing."""
        return {}

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """This rank's microbatches of the next step. Advances `position` by the step's rows.

        Raises DataError if reading fails, and after `stall_limit_s` without rows, with the file that the threads wait for.
        """
        with self._changed:
            if self.position not in self._read:
                self._wait()
            step = self._read[self.position]
            if isinstance(step, BaseException):
                raise step  # stays in _read, so that every later call raises it too
            del self._read[self.position]
            self.position += self._global_rows
            if self._fetching is not None:
                self._fetching.position = self.position
            self._changed.notify_all()
        return step

    def close(self) -> None:
        """Stop reading and fetching ahead. A thread stuck in a read is left; it is a daemon, so the process can still end."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._fetching is not None:
            self._fetching.close()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def step_at(self, position: int) -> list[Batch]:
        """This rank's microbatches of the step that starts at `position`."""
        size = self._microbatch_rows
        starts = np.arange(position + self._rank * size, position + self._global_rows, self._ranks * size)
        batches, together = [], max(1, _ROWS_PER_READ // size)
        for first in range(0, len(starts), together):
            positions = (starts[first : first + together, None] + np.arange(size)).reshape(-1)
            rows = self._dataset.training_rows(positions)
            batches += [rows.part(at, at + size) for at in range(0, len(positions), size)]
        return [batch.pinned() for batch in batches] if self._pin else batches

    def _wait(self) -> None:
        """Wait until the next step is read. The caller holds `_changed`."""
        began = time.monotonic()
        while self.position not in self._read:
            waited = time.monotonic() - began
            left = min(self._stall_warning_s, self._stall_limit_s - waited)
            if left <= 0:
                raise DataError(
                    f"no rows for {waited:.0f} s (data.stall_limit_s): {self._dataset.activity.describe()}. Check that "
                    f"file's disk or network. Started again, the run continues from its last checkpoint."
                )
            if not self._changed.wait(timeout=left) and self.position not in self._read:
                log.warning("no rows for %.0f s: %s.", time.monotonic() - began, self._dataset.activity.describe())

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._next_read < self.position + self._ahead_rows)
                if self._is_closing:
                    return
                position = self._next_read
                self._next_read += self._global_rows
            try:
                step: list[Batch] | BaseException = self.step_at(position)
            except BaseException as error:
                step = error
            with self._changed:
                self._read[position] = step
                if isinstance(step, BaseException):
                    self._is_closing = True  # later steps are never read
                self._changed.notify_all()
