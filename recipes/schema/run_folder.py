"""Names of the files in a run's folder, and safe reading of them by other programs than the trainer.

    RUN/recipe.yaml               the recipe with which the run was last started
    RUN/metrics.jsonl             its record, one JSON object a line, only appended (written by train.record.metrics)
    RUN/checkpoints/step_N/       published checkpoints
    RUN/checkpoints/latest        name of the newest one, a hint for people

JSON has no NaN and no infinities. Such numbers are written as the texts "NaN", "Infinity" and "-Infinity", at any depth. A text
that looks like one of them (a source may have such a name) gets one more apostrophe in front. So reading returns what was
written.

The run may be running, killed, damaged or someone else's. So every read has a size limit and accepts regular files only,
because a pipe or a device would block the reader for ever. Incomplete lines are left out.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.foreign import open_regular, parse_yaml, read_bounded_text, without_literals

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SUSPECTS = "suspects.jsonl"
"""Ranks and hosts that were found to compute or store wrong numbers, one JSON object a line (`train.integrity`)."""
POINTER = "latest"

Line = dict[str, Any]
"""One event of metrics.jsonl. `kind` is the kind of event."""

_RECIPE_BYTES = 8 << 20
_TAIL_BYTES = 256 * 1024
_NAME_BYTES = 200
_STEP_NAME = re.compile(r"step_[0-9]{1,18}")

_COUNTS = {"step", "total_steps", "tokens", "parameters", "threads", "bytes", "memory_bytes"}
_TEXTS = {
    "kind",
    "name",
    "layout",
    "device",
    "cpu",
    "torch",
    "python",
    "kernels",
    "precision",
    "scaling",
    "text",
    "path",
}
"""Fields that contain counts or texts. A line with another type in one of them was not written by a trainer and is left out."""
_LARGEST_COUNT = 1 << 62

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The texts for numbers that JSON does not have."""
_LIKE_A_NUMBER = re.compile("'*(" + "|".join(_NOT_FINITE) + ")")
"""Texts that get one more apostrophe in front, so that they are not read as such a number."""


def recipe_in(folder: Path) -> dict[str, Any]:
    """The mapping in a run's recipe.yaml. FileNotFoundError if there is none; RecipeError if it cannot be read."""
    path = folder / RECIPE
    try:
        plain = parse_yaml(read_bounded_text(path, most_bytes=_RECIPE_BYTES))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not isinstance(plain, dict):
        raise RecipeError(f"{path} cannot be read: it contains {type(plain).__name__}, not the fields of a recipe.")
    return {str(key): without_literals(value) for key, value in plain.items()}


def read_metrics(path: Path, *, first_bytes: int | None = None) -> list[Line]:
    """The lines of a metrics.jsonl in order, without incomplete lines. Raises OSError.

    first_bytes: read only the beginning, as long as the file was at an earlier time.
    """
    with open_regular(path) as stream:
        return _lines_of(stream if first_bytes is None else stream.read(first_bytes).splitlines())


def last_metrics(path: Path) -> list[Line]:
    """The last lines of a metrics.jsonl, which may be huge and growing; [] if it does not exist or cannot be read."""
    return _lines_of(_tail(path).splitlines())


def last_texts(path: Path, count: int) -> list[str]:
    """The last `count` lines of a text file, such as a log; [] if it does not exist or cannot be read."""
    return _tail(path).decode(errors="replace").splitlines()[-count:]


def as_json(value: Any) -> Any:
    """A value that strict JSON can contain. NaN and infinities, at any depth, become texts that reading turns back."""
    match value:
        case dict():
            return {key: as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [as_json(item) for item in value]
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case str() if _LIKE_A_NUMBER.fullmatch(value):
            return f"'{value}"
    return value


def as_number(value: Any) -> float:
    """A value as a float; NaN if it is not a number, so that formatting it cannot fail."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.nan


def name_of(step: int) -> str:
    """Name of the folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def steps_in(folder: Path) -> list[Path]:
    """Checkpoints that were published in a folder, oldest first. CheckpointError if the folder cannot be read."""
    try:
        # Not glob: it silently skips a folder that cannot be read, and the run would start again at step 0.
        named = [
            folder / name for name in os.listdir(folder) if _STEP_NAME.fullmatch(name) and (folder / name).is_dir()
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    # One step may have two folders: if a save cannot replace the old one, its name has one more zero. It is the newer one.
    return sorted(named, key=lambda path: (step_of(path), len(path.name)))


def pointed_at(folder: Path) -> str | None:
    """The name in a folder's pointer `latest`; None if there is no such file. Raises OSError."""
    try:
        with open_regular(folder / POINTER) as stream:
            return stream.read(_NAME_BYTES).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _tail(path: Path) -> bytes:
    try:
        with open_regular(path) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            return stream.read(_TAIL_BYTES)
    except OSError:
        return b""


def _lines_of(texts: Iterable[bytes]) -> list[Line]:
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # incomplete: the run was killed while it wrote the line, or is writing it
        if isinstance(line, dict) and "kind" in line:
            line = _read_back(line)
            if _has_right_types(line):
                lines.append(line)
    return lines


def _has_right_types(line: Line) -> bool:
    for key, value in line.items():
        if key in _COUNTS and not (type(value) is int and 0 <= value <= _LARGEST_COUNT):
            return False
        if key in _TEXTS and not isinstance(value, str):
            return False
    has_parts = line["kind"] in (
        "step",
        "unreduced_step",
    )  # seconds of each part of the step; in other events, one number
    if "seconds" in line and not isinstance(line["seconds"], dict if has_parts else int | float):
        return False
    return isinstance(line.get("bits_per_byte", {}), dict)


def _read_back(value: Any) -> Any:
    """The inverse of `as_json`."""
    match value:
        case dict():
            return {key: _read_back(item) for key, item in value.items()}
        case list():
            return [_read_back(item) for item in value]
        case str() if _LIKE_A_NUMBER.fullmatch(value):
            return _NOT_FINITE.get(value, value[1:])
    return value


def how_to_import(path: Path) -> str:
    """What to do with a model in Hugging Face's format, which no command but `stratum hf` reads; empty if the path is not one."""
    try:
        is_model = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    except (OSError, ValueError):
        return ""
    if not is_model:
        return ""
    name = path.resolve().name
    out = shlex.quote(f"imports/{name}")
    return (
        f"{path} is a model in Hugging Face's format. Import it: stratum hf import {shlex.quote(str(path))} --out {out}. Then: "
        f"stratum generate (or serve) --config-dir {out} -cn {shlex.quote(name)}, stratum evaluate {out}/checkpoint --tasks NAME."
    )
