"""Reads the texts of a Hugging Face `datasets` set.

    hf:NAME             a set of the Hub, or a local folder with the files of one: downloaded once, or streamed
    format: dataset     a folder written by `save_to_disk`

A part of a set on disk is a range of rows. A part of a streamed set is one of the set's own shards.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.media.record import Fetch, folder_fetch
from data.sources.files import ReadError
from data.sources.records import Part, Record, checked, columns_of, text_of
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError

HUB = "hf:"
_ROWS = 64


@dataclass(frozen=True)
class SetFacts:
    """Size of a set, from which parts are cut."""

    rows: int
    """Rows of a set on disk; 0 for a streamed one."""
    bytes: int
    """Bytes of the tables of a set on disk; 0 for a streamed one."""
    shards: int
    """Shards of a streamed set; 0 for one on disk."""


def is_set(source: SourceConfig) -> bool:
    """Whether a source is a `datasets` set: by its path, its format, or the files in the folder."""
    if source.format == "dataset" or (source.path.startswith(HUB) and not source.path.startswith(f"{HUB}//")):
        return True
    folder = Path(source.path)
    return source.format == "auto" and (
        (folder / "dataset_dict.json").is_file()
        or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file())
    )


def set_facts(place: str, source: SourceConfig) -> SetFacts:
    """Size of a set. DataError if it cannot be opened."""
    opened = _open(place, source)
    if source.streaming:
        return SetFacts(rows=0, bytes=0, shards=opened.num_shards)
    return SetFacts(rows=len(opened), bytes=int(opened.data.nbytes), shards=0)


def hub_revision(source: SourceConfig) -> str | None:
    """Revision of a set of the Hub that would be opened now; offline, of the newest cached copy. None if it cannot be opened."""
    import datasets

    try:
        return datasets.load_dataset_builder(source.path.removeprefix(HUB), source.config).hash
    except Exception:  # no network, no copy, a wrong name: opening the set reports it
        return None


def read_set(place: str, source: SourceConfig, part: Part) -> Iterator[Record]:
    """The records of one part of a set."""
    opened = _open(place, source)
    extract = text_of(source, is_table=True, fetch=_fetch(source))
    if not source.streaming:
        columns = columns_of(place, source, opened.column_names, f"the set {source.path}")
    try:
        if source.streaming:
            opened = opened.shard(num_shards=opened.num_shards, index=part.start)
            if source.kind == "media":
                opened = opened.decode(False)  # bytes and paths as stored; decoding is `data.media`'s
            rows: Iterator[dict[str, Any]] = iter(opened)
        else:
            opened = opened.select_columns(columns)
            if source.kind == "media":
                rows = _stored_rows(opened.with_format("arrow"), part.start, part.stop or len(opened))
            else:
                rows = _rows(opened, part.start, part.stop or len(opened))
        span = max(1, (part.stop or 1) - part.start)
        for number, row in enumerate(rows):
            done = 0 if source.streaming else part.size * (number + 1) // span
            try:
                text = extract(row)
            except ValueError as error:
                yield Record(number, "", str(error), done)
            else:
                yield Record(number, text, checked(text, source.max_record_bytes), done)
    except DataError:
        raise
    except Exception as error:  # the library and the Hub raise errors of many kinds
        raise ReadError(f"{place}: the set {source.path} cannot be read: {type(error).__name__}: {error}") from error


def _fetch(source: SourceConfig) -> Fetch | None:
    """Reads the files that rows of a local set name, relative to its folder."""
    folder = Path(source.path.removeprefix(HUB))
    if source.kind != "media" or not folder.is_dir():
        return None
    return folder_fetch(folder, most_bytes=source.max_record_bytes)


def _rows(opened: Any, start: int, stop: int) -> Iterator[dict[str, Any]]:
    for first in range(start, stop, _ROWS):
        columns = opened[first : min(first + _ROWS, stop)]
        names = list(columns)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _stored_rows(opened: Any, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """The rows as stored: images and audio as bytes or paths, which the library would decode otherwise. opened: as Arrow."""
    for number in range(start, stop):
        yield opened[number].to_pylist()[0]


def _open(place: str, source: SourceConfig) -> Any:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    name = source.path.removeprefix(HUB)
    if source.streaming and not source.path.startswith(HUB):
        raise DataError(
            f"{place}.streaming is for sets of the Hub (path hf:NAME), and {name} is on this disk. Leave it out."
        )
    try:
        if source.path.startswith(HUB):
            opened = datasets.load_dataset(name, source.config, split=source.split, streaming=source.streaming)
        else:
            opened = datasets.load_from_disk(name)
            if isinstance(opened, datasets.DatasetDict):
                if source.split not in opened:
                    raise DataError(
                        f"{place}: {name} has no split {source.split!r} (it has: {', '.join(opened)}). Set "
                        f"{place}.split."
                    )
                opened = opened[source.split]
    except DataError:
        raise
    except Exception as error:  # a wrong name, a wrong split, no network: the library's message names it
        raise DataError(
            f"{place}: the set {source.path} (config {source.config}, split {source.split}) cannot be opened: "
            f"{type(error).__name__}: {error}"
        ) from error
    return opened
