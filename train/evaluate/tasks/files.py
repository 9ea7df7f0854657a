"""Tasks from the user's files: a YAML file (`recipes.schema.tasks.TaskConfig`) and the jsonl file that it names.

Every record is read and checked before the task starts; errors name file and line.
"""

import codecs
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from recipes.schema.errors import DataError
from recipes.schema.foreign import open_regular, parse_json, printable
from recipes.schema.suggestions import did_you_mean
from recipes.schema.tasks import TaskConfig, read_task
from train.evaluate.last_number import last_number
from train.evaluate.tasks.task import Item, Kind, Task
from train.evaluate.tasks.verify import JUDGES, exact

_LONGEST_LINE = 16 << 20
_MOST_ITEMS = 1_000_000
_PIECES = re.compile(r"\{\{|\}\}|\{(\w+)\}|[{}]|[^{}]+")
_ID_FIELDS = ("id", "task_id")
_KINDS: dict[str, Kind] = {
    "cloze": "cloze",
    "multiple_choice": "multiple_choice",
    "rolling": "rolling",
    "exact_match": "generate",
    "generate": "generate",
}


def open_task_file(path: Path, *, items: int | None = None) -> Task:
    """The task of a file. items: the largest number of items. DataError names file, line and field of an error."""
    config = read_task(path)
    if "" in config.stop:
        raise DataError(f"{path}: stop={list(config.stop)} has an empty text, which would end every answer. Remove it.")
    data = path.parent / config.data
    most = min(config.items or _MOST_ITEMS, items or _MOST_ITEMS)
    shots: list[str] = []
    asked: list[Item] = []
    seen: dict[tuple[str, str], str] = {}
    for place, record in _records(data, told_by=path):
        _check_ids(record, place, seen)
        item = _item(config, record, place)
        if len(shots) < config.shots:
            shots.append(item.prompt + (item.targets[item.answer] if item.targets else ""))
            continue
        if len(asked) == most:
            break
        before = "".join(shot + config.separator for shot in shots)
        asked.append(Item(item.place, before + item.prompt, item.targets, item.answer))
    if not asked:
        examples = f" ({len(shots)} of them serve as examples, shots={config.shots})" if config.shots else ""
        remedy = f"Add records, or lower shots in {path}." if config.shots else "Add records, one JSON object a line."
        raise DataError(f"{data} has no record to ask{examples}. {remedy}")
    is_exact = config.kind == "exact_match"
    judge = (exact if is_exact else JUDGES[config.verifier]) if _KINDS[config.kind] == "generate" else None
    return Task(
        name=config.name or path.stem,
        kind=_KINDS[config.kind],
        items=tuple(asked),
        end_of_document=config.end_of_document,
        max_new_tokens=config.max_new_tokens if judge else 0,
        stop=config.stop if judge else (),
        judge=judge,
        is_graded=judge is JUDGES["all"],
        settings={"verifier": "exact" if is_exact else config.verifier} if judge else {},
    )


def _check_ids(record: Mapping[str, Any], place: str, seen: dict[tuple[str, str], str]) -> None:
    """DataError for an `id` or `task_id` that an earlier record has: a copy would count twice. seen: where each one is."""
    for key in _ID_FIELDS:
        if isinstance(value := record.get(key), str | int):
            first = seen.setdefault((key, str(value)), place)
            if first != place:
                raise DataError(
                    f"{place}: {key}={_shown(value)} is that of {first} too. Remove one of the two records."
                )


def filled(template: str, record: Mapping[str, Any], *, place: str, key: str) -> str:
    """A template with the record's fields filled in. Braces inside the fields are ordinary text."""
    parts = []
    for found in _PIECES.finditer(template):
        piece, name = found[0], found[1]
        if name is not None:
            parts.append(_text(record, name, place=place, key=key))
        elif piece in ("{", "}"):
            raise DataError(f"{key}={printable(template)!r} has a single {piece!r}. Write {piece * 2} for a brace.")
        else:
            parts.append({"{{": "{", "}}": "}"}.get(piece, piece))
    return "".join(parts)


def _item(config: TaskConfig, record: Mapping[str, Any], place: str) -> Item:
    prompt = filled(config.prompt, record, place=place, key="prompt")
    if config.kind == "rolling":
        if not prompt:
            raise DataError(f"{place}: the text is empty. Remove the record.")
        return Item(place, prompt)
    if config.kind == "multiple_choice":
        choices = _choices(config, record, place)
        return Item(place, prompt, choices, _answer(config, record, place, count=len(choices)))
    target = filled(config.target, record, place=place, key="target")
    if not target.strip():
        raise DataError(f"{place}: the target is empty, so there is nothing to score. Fill in the record or remove it.")
    if config.kind == "generate" and config.verifier == "number" and last_number(target) is None:
        raise DataError(f"{place}: the target {printable(target, most=60)!r} has no number, and verifier is number.")
    return Item(place, prompt, (target,))


def _choices(config: TaskConfig, record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    choices = _field(record, config.choices, place=place, key="choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{place}: {config.choices}={_shown(choices)} is not a list of two or more choices.")
    for number, choice in enumerate(choices):
        if not _is_text(choice) or not str(choice).strip():
            raise DataError(
                f"{place}: choice {number} of {config.choices} is {_shown(choice)}, not a text with content."
            )
    if len(set(map(str, choices))) < len(choices):
        raise DataError(f"{place}: {config.choices} has the same choice twice: {_shown(choices)}.")
    return tuple(filled(config.choice, {**record, "choice": choice}, place=place, key="choice") for choice in choices)


def _answer(config: TaskConfig, record: Mapping[str, Any], place: str, *, count: int) -> int:
    answer = _field(record, config.answer, place=place, key="answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < count:
            return answer
        raise DataError(f"{place}: {config.answer}={answer} is not the number of a choice, 0 to {count - 1}.")
    choices = list(map(str, record[config.choices]))
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    raise DataError(f"{place}: {config.answer}={_shown(answer)} is neither a choice nor the number of one.")


def _field(record: Mapping[str, Any], name: str, *, place: str, key: str) -> Any:
    if name not in record:
        hint = did_you_mean(name, map(str, record), otherwise=f"It has {', '.join(map(str, record)) or 'no fields'}.")
        raise DataError(f"{place}: the record has no field {name!r}, which `{key}` needs. {printable(hint, most=300)}")
    return record[name]


def _text(record: Mapping[str, Any], name: str, *, place: str, key: str) -> str:
    value = _field(record, name, place=place, key=key)
    if not _is_text(value):
        raise DataError(f"{place}: {name}={_shown(value)} is not a text or a number, which `{key}` needs.")
    return str(value)


def _is_text(value: Any) -> bool:
    """Whether a value is a text that has bytes (a lone surrogate has none), or a number."""
    if isinstance(value, str):
        return value.isascii() or value.encode(errors="replace").decode() == value
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _records(path: Path, *, told_by: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line that is not blank."""
    try:
        with open_regular(path) as stream:
            for number, line in enumerate(_lines(stream, path), start=1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    record = parse_json(line)
                except ValueError as error:
                    why = printable(str(error), most=120)
                    raise DataError(
                        f"{place}: this line is not JSON: {why}. Write one record a line, {{...}}, without brackets around all."
                    ) from error
                if not isinstance(record, dict):
                    raise DataError(f"{place}: {_shown(record)} is not a record with fields.")
                yield place, record
    except OSError as error:
        raise DataError(f"{path}, the data of {told_by}, cannot be read: {error.strerror or error}.") from error


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines; the mark that some editors put at the begin of a file is left out."""
    number = 0
    while line := stream.readline(_LONGEST_LINE + 1):
        number += 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if len(line) > _LONGEST_LINE:
            raise DataError(f"{path}:{number}: this line is longer than {_LONGEST_LINE >> 20} MiB.")
        yield line


def _shown(value: Any) -> str:
    return printable(repr(value), most=80)
