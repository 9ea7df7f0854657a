"""Facts about a run from the files in its folder: steps done, newest checkpoint, speed, logs. Only reads; imports no torch.

runs/NAME/recipe.yaml  metrics.jsonl  checkpoints/latest          written by the trainer
runs/NAME/logs/ATTEMPT/rank-00000.log  failure-00003.json         one folder for each start of the processes
runs/NAME/logs/job.sh  jobs  slurm-JOB.log  stop                  `stratum launch slurm`: the script, its job numbers, its output

The folder may be damaged or someone else's. A file that cannot be read, or has unexpected content, counts as missing.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from recipes.schema.credentials import without_credentials
from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.options import is_run
from recipes.schema.run_folder import CHECKPOINTS, METRICS, Line, as_number, last_metrics, recipe_in, step_of, steps_in


@dataclass(frozen=True)
class Progress:
    """How far a run is, from the last lines of its metrics."""

    step: int
    total_steps: int | None
    loss: float
    tokens_per_s: float
    seconds_left: float | None
    """At the speed of the last steps, including evaluations and saves; None if the total is unknown."""
    age_s: float
    """Time since the last step was recorded."""
    skipped_steps: int = 0
    """Steps that were skipped because of a spike (run.spikes)."""
    rollbacks: int = 0
    """How often the run went back from a spike to a checkpoint."""


class RunFolder:
    """The folder of one run, for programs other than its trainer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"

    def attempts(self) -> list[Path]:
        """Folders of rank logs, one for each start, oldest first."""
        return by_age(path for path in self.logs.glob("*-*") if path.is_dir()) if self.logs.is_dir() else []

    def newest_checkpoint(self) -> str | None:
        """Name of the newest published checkpoint; None without one. Only the trainer verifies checkpoints."""
        found = self._checkpoints()
        return found[-1].name if found else None

    def checkpoint_step(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        found = self._checkpoints()
        return step_of(found[-1]) if found else 0

    def step(self) -> int:
        """The last recorded step; 0 before the first."""
        found = self.progress()
        return found.step if found is not None else 0

    def _checkpoints(self) -> list[Path]:
        try:
            return steps_in(self.path / CHECKPOINTS)
        except CheckpointError:
            return []

    def total_steps(self) -> int | None:
        """`run.steps` of the recipe with which the run was last started; None before its first start."""
        try:
            return int(recipe_in(self.path)["run"]["steps"])
        except (OSError, RecipeError, KeyError, TypeError, ValueError, OverflowError):
            return None

    def progress(self) -> Progress | None:
        """Progress by the last recorded steps; None before the first step."""
        steps = [line for line in last_metrics(self.path / METRICS) if line.get("kind") == "step"]
        steps = [line for line in steps if 0 <= _number(line, "step") < 1e18 and 0 <= _number(line, "time") < 1e11]
        if not steps:
            return None
        last, total = steps[-1], self.total_steps()
        before = [line for line in steps[-50:] if line["step"] < last["step"] and line["time"] < last["time"]]
        pace = (last["time"] - before[0]["time"]) / (last["step"] - before[0]["step"]) if before else None
        left = None if total is None or pace is None else pace * max(0, total - last["step"])
        return Progress(
            step=int(last["step"]),
            total_steps=total,
            loss=_number(last, "loss"),
            tokens_per_s=_number(last, "tokens_per_s"),
            seconds_left=left,
            age_s=max(0.0, time.time() - last["time"]),
            skipped_steps=_count(last, "skipped_steps"),
            rollbacks=_count(last, "rollbacks"),
        )

    def storage_line(self) -> str:
        """What the run's record says about its storage, in one line; empty without one."""
        try:
            storage = recipe_in(self.path)["run"].get("storage")
        except (OSError, RecipeError, KeyError, TypeError, AttributeError):
            return ""
        if not isinstance(storage, str):
            return ""
        lines = last_metrics(self.path / METRICS)
        copies = [
            line
            for line in lines
            if line["kind"] in ("storage_copy", "storage_failed", "storage_retried") and "step" in line
        ]
        last = next((line for line in reversed(copies) if line["kind"] == "storage_copy"), None)
        text = f"step {last['step']} is copied" if last else "no copy in the last lines of the record"
        if copies and copies[-1]["kind"] != "storage_copy":
            text += f"; the last try failed: {copies[-1].get('error')}"
        return f"storage {without_credentials(storage)}: {text}"

    def longest_stop_s(self) -> float:
        """The longest recorded step plus the longest recorded save: the time that the run needs to save and stop."""
        lines = last_metrics(self.path / METRICS)
        steps = [_number(line, "step_s") for line in lines if line.get("kind") == "step"]
        saves = [
            _number(line, "seconds") for line in lines if line.get("kind") == "phase" and line.get("name") == "saving"
        ]
        return sum(max(filter(math.isfinite, times), default=0.0) for times in (steps, saves))


def by_age(paths: Iterable[Path]) -> list[Path]:
    """Paths by the time of their last change, oldest first. Missing files and broken links are left out."""
    times: dict[Path, float] = {}
    for path in paths:
        try:
            times[path] = path.stat().st_mtime
        except OSError:
            continue
    return sorted(times, key=times.__getitem__)


def runs_in(folder: Path) -> list[RunFolder]:
    """The runs in a folder of runs, by name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_run(path)]
    return [RunFolder(path) for path in sorted(found)]


def _count(line: Line, key: str) -> int:
    value = _number(line, key)
    return int(value) if 0 <= value < 1e18 else 0


def _number(line: Line, key: str) -> float:
    try:
        return as_number(line.get(key))
    except OverflowError:  # JSON allows integers of any length
        return math.nan
