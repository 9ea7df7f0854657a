"""The interface of a tracker, and the run that it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from train.record.trackers.rows import Row


@dataclass(frozen=True)
class TrackedRun:
    """One run at a tracker. A run folder has one, and one more each time it goes back and continues with another recipe."""

    folder: Path
    identity: str
    """A random text, kept in the run's folder. The tracker finds the run by it when it continues."""
    part: int
    """1 for the first."""
    recipe: dict[str, Any]

    @property
    def group(self) -> str:
        """Name of the run folder: what its parts have in common."""
        return self.folder.name

    @property
    def name(self) -> str:
        """Name to show."""
        return self.group if self.part == 1 else f"{self.group}-part{self.part}"

    @property
    def key(self) -> str:
        """A text that no other run has, nor another part of this one."""
        return self.identity if self.part == 1 else f"{self.identity}-{self.part}"


class Tracker(Protocol):
    """A run at a tracker, open for more rows. Any method may raise, or never return: `Follower` deals with both."""

    last_step: int
    """The last step that the tracker had when the run was opened; -1 without one."""

    def send(self, rows: Sequence[Row]) -> None:
        """Send rows, whose steps are after `last_step` and increase. A row arrives whole or not at all."""

    def close(self) -> None:
        """Wait until everything has been sent."""
