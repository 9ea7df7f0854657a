"""What `stratum doctor --qualify` runs, and what it found: shared by the schedule and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Piece:
    """One process of the schedule."""

    name: str
    about: str
    command: tuple[str, ...]
    limit_minutes: float
    plan: tuple[str, ...] = ()
    """Recipe arguments for `stratum plan`, whose prediction is shown next to what the piece measures."""
    needs: str = ""
    """What is missing on this machine; the piece is then left out, with this text."""


@dataclass
class Result:
    """What became of a piece."""

    name: str
    about: str
    command: str
    state: str = "not started"
    """passed, failed, out of time, refused (a rule says that this machine cannot run the recipe), skipped (no test of it
    could run here), left out (something is missing), not started (no time)."""
    seconds: float = 0.0
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, Any] = field(default_factory=dict)
    tail: str = ""
    """The last lines of a piece that did not pass."""


@dataclass(frozen=True)
class Options:
    """What is run and where its files go."""

    folder: Path
    budget_minutes: float
    rehearse: bool
    gpus: int
    missing: tuple[str, ...]
    """Packages for GPUs that are not installed."""
