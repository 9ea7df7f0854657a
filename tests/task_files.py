"""Task files for tests, and the command that evaluates them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import yaml

from train import stratum

CAPITALS = [
    {"country": "France", "cities": ["Paris", "Lyon"], "right": 0},
    {"country": "Italy", "cities": ["Milan", "Rome"], "right": "Rome"},
    {"country": "{Spain}", "cities": ["Madrid", "Vigo", "Toledo"], "right": 0},
]
CHOICES: dict[str, Any] = {
    "kind": "multiple_choice", "prompt": "{country}:", "choices": "cities", "answer": "right",
}  # fmt: skip
"""Fields of a task of CAPITALS."""


def task_in(folder: Path, records: list[Any], **fields: Any) -> Path:
    """A task file and its data."""
    folder.mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"data": "data.jsonl", **fields}))
    return path


def command(*words: str) -> tuple[int, str]:
    """`stratum evaluate WORDS` in this process. -> (exit status, everything it printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = stratum.main(["evaluate", *words])
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue()
