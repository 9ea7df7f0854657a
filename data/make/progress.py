"""Progress of `stratum prepare`: bars on a terminal, otherwise (a Slurm job's log) a line every 20 s."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data.system.console import bars
from recipes.schema import units

_LINE_EVERY_S = 20.0


class Display:
    """Progress of each source in stored bytes, and the total speed in bytes of text and tokens. A context manager."""

    def __init__(self, console: Console, sizes: dict[str, int]) -> None:
        """sizes: stored bytes to read, by source; 0 if unknown."""
        self._console = console
        self._sizes = sizes
        self._started = self._printed_at = time.monotonic()
        self._stored = self._text = self._tokens = 0
        self._bars = bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {
            name: self._bars.add_task(name, total=size or None, speed="") for name, size in sizes.items()
        }

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def advance(self, name: str, stored: int, text: int, tokens: int) -> None:
        """Add what was done of a source since the call before: stored bytes read, bytes of text and tokens written."""
        self._stored += stored
        self._text += text
        self._tokens += tokens
        self._bars.update(self._tasks[name], advance=stored, speed=self.speed)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed_at > _LINE_EVERY_S:
            self._printed_at = now
            total = sum(self._sizes.values())
            share = f"{self._stored / total:.0%} of {units.size(total)}" if total else units.size(self._stored)
            self._console.print(f"tokenized {share}; {self.speed}", highlight=False)

    @property
    def speed(self) -> str:
        """Bytes of text and tokens a second since the start."""
        seconds = max(1e-3, time.monotonic() - self._started)
        return f"{units.size(self._text / seconds)}/s of text, {self._tokens / seconds / 1e6:.2f}M tokens/s"
