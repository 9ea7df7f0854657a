"""What a run's folder says from outside: steps reached, newest checkpoint, speed, logs. Reads only; imports no torch.

runs/NAME/recipe.yaml  metrics.jsonl  checkpoints/latest          written by the trainer
runs/NAME/logs/ATTEMPT/rank-00000.log  failure-00003.json         one folder for each time processes were started
runs/NAME/logs/job.sh  jobs  slurm-JOB.log  stop                  `stratum launch slurm`: the script, its job numbers, its output
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.options import is_run
from recipes.schema.run_folder import CHECKPOINTS, METRICS, as_number, last_metrics, recipe_in, step_of, steps_in


@dataclass(frozen=True)
class Progress:
    """Where a run is, from the last lines of its metrics."""

    step: int
    total_steps: int | None
    loss: float
    tokens_per_s: float
    seconds_left: float | None
    """At the present speed, evaluations and saves included; None where the total is not known."""
    age_s: float
    """Since the last step was recorded."""


class RunFolder:
    """One run, looked at from outside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"

    def attempts(self) -> list[Path]:
        """Folders of rank logs, one for each start, oldest first."""
        folders = [p for p in self.logs.glob("*-*") if p.is_dir()] if self.logs.is_dir() else []
        return sorted(folders, key=lambda p: p.stat().st_mtime)

    def newest_checkpoint(self) -> str | None:
        """Name of the newest published checkpoint; None if there is none. Not verified: that is the trainer's part."""
        found = self._checkpoints()
        return found[-1].name if found else None

    def checkpoint_step(self) -> int:
        """Steps in the newest checkpoint, 0 if there is none."""
        found = self._checkpoints()
        return step_of(found[-1]) if found else 0

    def _checkpoints(self) -> list[Path]:
        try:
            return steps_in(self.path / CHECKPOINTS)
        except CheckpointError:
            return []

    def total_steps(self) -> int | None:
        """`run.steps` of the recipe the run was last started with; None before it ever started."""
        try:
            return int(recipe_in(self.path)["run"]["steps"])
        except (OSError, RecipeError, KeyError, TypeError, ValueError):
            return None

    def progress(self) -> Progress | None:
        """The last steps on record; None before the first."""
        steps = [line for line in last_metrics(self.path / METRICS) if line.get("kind") == "step"]
        steps = [line for line in steps if {"step", "loss", "tokens_per_s", "time"} <= line.keys()]
        if not steps:
            return None
        last, total = steps[-1], self.total_steps()
        for line in steps[-50:]:
            line["time"] = as_number(line["time"])
        before = [line for line in steps[-50:] if line["step"] < last["step"] and line["time"] < last["time"]]
        pace = (last["time"] - before[0]["time"]) / (last["step"] - before[0]["step"]) if before else None
        left = None if total is None or pace is None else pace * max(0, total - last["step"])
        return Progress(
            step=last["step"],
            total_steps=total,
            loss=as_number(last["loss"]),
            tokens_per_s=as_number(last["tokens_per_s"]),
            seconds_left=left,
            age_s=max(0.0, time.time() - last["time"]),
        )

    def longest_stop_s(self) -> float:
        """The longest step and the longest save on record together: what a run needs to stop in good order."""
        lines = last_metrics(self.path / METRICS)
        steps = [as_number(line.get("step_s")) for line in lines if line["kind"] == "step"]
        saves = [
            as_number(line.get("seconds")) for line in lines if line["kind"] == "phase" and line.get("name") == "saving"
        ]
        return sum(max(filter(math.isfinite, times), default=0.0) for times in (steps, saves))


def runs_in(folder: Path) -> list[RunFolder]:
    """The runs in a folder of runs, by name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_run(path)]
    return [RunFolder(path) for path in sorted(found)]
