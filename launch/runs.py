"""What a run's folder says from outside: steps reached, newest checkpoint, speed, logs. Reads only; imports no torch.

runs/NAME/recipe.yaml  metrics.jsonl  checkpoints/latest          written by the trainer
runs/NAME/logs/ATTEMPT/rank-00000.log  failure-00003.json         one folder for each time processes were started
runs/NAME/logs/job.sh  jobs  slurm-JOB.log  stop                  `stratum launch slurm`: the script, its job numbers, its output
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.schema.checkpoint_steps import METRICS as METRICS
from recipes.schema.options import is_run

_TAIL_BYTES = 256 * 1024


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
        """Name of the newest checkpoint; None where there is none. Not verified: that is the trainer's."""
        folder = self.path / "checkpoints"
        try:
            name = (folder / "latest").read_text().strip()
        except OSError:
            name = ""
        if name and (folder / name).is_dir():
            return name
        found = sorted(p.name for p in folder.glob("step_*") if p.is_dir())
        return found[-1] if found else None

    def checkpoint_step(self) -> int:
        """Steps in the newest checkpoint, 0 where there is none."""
        found = re.search(r"(\d+)$", self.newest_checkpoint() or "")
        return int(found.group(1)) if found else 0

    def total_steps(self) -> int | None:
        """`run.steps` of the recipe the run was last started with; None before it ever started."""
        try:
            return int(yaml.safe_load((self.path / "recipe.yaml").read_text())["run"]["steps"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            return None

    def progress(self) -> Progress | None:
        """The last steps on record; None before the first."""
        steps = [line for line in last_lines(self.path / METRICS) if line.get("kind") == "step"]
        steps = [line for line in steps if {"step", "loss", "tokens_per_s", "time"} <= line.keys()]
        if not steps:
            return None
        last, total = steps[-1], self.total_steps()
        before = [line for line in steps[-50:] if line["step"] < last["step"] and line["time"] < last["time"]]
        pace = (last["time"] - before[0]["time"]) / (last["step"] - before[0]["step"]) if before else None
        left = None if total is None or pace is None else pace * max(0, total - last["step"])
        return Progress(
            step=last["step"],
            total_steps=total,
            loss=float(last["loss"]),
            tokens_per_s=float(last["tokens_per_s"]),
            seconds_left=left,
            age_s=max(0.0, time.time() - last["time"]),
        )

    def longest_stop_s(self) -> float:
        """The longest step and the longest save on record together: what a run needs to stop in good order."""
        lines = last_lines(self.path / METRICS)
        steps = [line.get("step_s", 0.0) for line in lines if line.get("kind") == "step"]
        saves = [line["seconds"] for line in lines if line.get("kind") == "phase" and line.get("name") == "saving"]
        return max(steps, default=0.0) + max(saves, default=0.0)


def runs_in(folder: Path) -> list[RunFolder]:
    """The runs in a folder of runs, by name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_run(path)]
    return [RunFolder(path) for path in sorted(found)]


def last_lines(path: Path) -> list[dict[str, Any]]:
    """Whole JSON lines at the end of a file that may be growing and huge; [] where there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL_BYTES))
            texts = stream.read().splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the first may be cut, the last unfinished
        if isinstance(line, dict):
            lines.append(line)
    return lines


def tail(path: Path, count: int) -> list[str]:
    """The last `count` lines of a text file; [] where there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL_BYTES))
            return stream.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
