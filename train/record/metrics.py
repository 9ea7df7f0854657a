"""metrics.jsonl, the record of a run that all else is made from: strict JSON, a line an event, only ever appended.

JSON has no NaN and no infinities. As numbers they are written as their names, "NaN", "Infinity", "-Infinity", at any depth; a
text that reads like one of them (a source may be named so) is written with one more apostrophe in front. So each reads back as it
was.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from recipes.schema.checkpoint_steps import METRICS as METRICS
from recipes.schema.errors import StratumError

Line = dict[str, Any]
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LIKE_A_NUMBER = re.compile("'*(" + "|".join(_NOT_FINITE) + ")")


class JsonLines:
    """metrics.jsonl: whole lines, handed to the operating system at once, so that a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab+")
            if self._stream.tell() > 0:
                self._stream.seek(-1, os.SEEK_END)
                if self._stream.read(1) != b"\n":
                    self._stream.write(b"\n")
        except OSError as error:
            raise self._full(error) from error

    def write(self, lines: list[Line]) -> None:
        text = "".join(json.dumps(_strict(line), allow_nan=False) + "\n" for line in lines)
        try:
            self._stream.write(text.encode())
            self._stream.flush()
        except OSError as error:
            raise self._full(error) from error

    def close(self) -> None:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._full(error) from error
        finally:
            self._stream.close()

    def _full(self, error: OSError) -> StratumError:
        return StratumError(
            f"{self._path} cannot be written: {error.strerror or error}. Free space or permit writing there; the same "
            f"command then continues from the newest checkpoint."
        )


def _strict(value: Any) -> Any:
    """A value as strict JSON can hold it, which `_read_back` turns back."""
    match value:
        case dict():
            return {key: _strict(item) for key, item in value.items()}
        case list() | tuple():
            return [_strict(item) for item in value]
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case str() if _LIKE_A_NUMBER.fullmatch(value):
            return f"'{value}"
    return value


def _read_back(value: Any) -> Any:
    match value:
        case dict():
            return {key: _read_back(item) for key, item in value.items()}
        case list():
            return [_read_back(item) for item in value]
        case str() if _LIKE_A_NUMBER.fullmatch(value):
            return _NOT_FINITE.get(value, value[1:])
    return value


def as_number(value: Any) -> float:
    """What a reader of a record takes for a number: NaN for whatever is not one, so that formatting it cannot fail."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl in order; a torn line is left out."""
    lines = []
    with path.open("rb") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "kind" in line:
                lines.append(_read_back(line))
    return lines
