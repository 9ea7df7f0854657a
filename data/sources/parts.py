"""Cuts a source into parts and groups them by shard. This is decided once, before texts are read.

    files or rows --cut at about shard_bytes--> [[Part, ...], ...]: the parts of each shard

The cut depends on the names and sizes of the files only, so the shards are the same for any number of workers and tasks. A
large file is cut if its format allows it: jsonl at line ends, parquet between row groups, a set between rows. Compressed
files and text files are not cut.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data.sources import child
from data.sources.files import File, find_files, is_compressed, is_remote, plain_suffix
from data.sources.records import Part, Record, lines_before, read_part
from data.sources.sets import is_set
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError

MAX_FILES = 8192
"""Largest number of files in one shard."""
_KINDS = {".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".py": "text", ".jsonl": "jsonl", ".json": "jsonl",
          ".ndjson": "jsonl", ".jsonlines": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv",
          ".tar": "webdataset"}  # fmt: skip


def cut(place: str, source: SourceConfig, shard_bytes: int, *, hidden: list[str] | None = None) -> list[list[Part]]:
    """The parts of each shard of a source. DataError if the source cannot be found or opened. hidden: see `find_files`."""
    if is_set(source):
        return _cut_set(place, source, shard_bytes)
    if source.streaming:
        raise DataError(
            f"{place}.streaming is for sets of the Hub (path hf:NAME), and {source.path} is not one. Leave it out."
        )
    shards: list[list[Part]] = []
    group: list[Part] = []
    grouped = 0
    for file in find_files(f"{place}.path", source.path, hidden=hidden):
        kind = kind_of(place, source, file)
        pieces = _cut_file(place, source, file, kind, shard_bytes) if file.size > shard_bytes * 3 // 2 else []
        if len(pieces) > 1:
            shards += [group] if group else []
            group, grouped = [], 0
            shards += [[piece] for piece in pieces]
            continue
        group.append(Part(file=file.name, kind=kind, size=file.size, file_size=file.size))
        grouped += file.size or (shard_bytes if is_remote(file.name) else 0)  # an unknown size counts as a whole shard
        if grouped >= shard_bytes or len(group) == MAX_FILES:
            shards.append(group)
            group, grouped = [], 0
    return [*shards, group] if group else shards


def kind_of(place: str, source: SourceConfig, file: File) -> str:
    """The format of a file: the source's `format`, or by the file's name. DataError if neither gives it."""
    kind = source.format if source.format != "auto" else _KINDS.get(plain_suffix(file.name))
    if kind is None:
        raise DataError(
            f"{file.name} ({place}): its name does not give its format. Set {place}.format (text: the whole file is one "
            f"document; jsonl, csv, ...), or give a path without it, such as a glob of *.jsonl. Known: {', '.join(_KINDS)}, also "
            f"compressed."
        )
    if kind == "text" and source.kind != "text":
        raise DataError(
            f"{file.name} ({place}) is a text file, and {place}.kind={source.kind} needs records with "
            f"{'parts' if source.kind == 'media' else 'messages'}. Set {place}.format, or give a path of jsonl or parquet files."
        )
    if kind == "webdataset" and source.kind != "media":
        raise DataError(
            f"{file.name} ({place}) is a tar file, which is read as samples of media, and {place}.kind={source.kind}. Set kind "
            f"to media, or unpack it."
        )
    return kind


def read(place: str, source: SourceConfig, part: Part) -> Iterator[Record]:
    """The records of one part of a file or a set."""
    reader = child.records if part.kind in ("dataset", "parquet") else read_part
    for record in reader(place, source, part):
        if part.records is not None and record.number >= part.records:
            return
        yield record


def problem_of(place: str, source: SourceConfig, part: Part, number: int, problem: str) -> str:
    """Message about a bad record: file, line or row (from 1), problem."""
    if part.kind == "text":
        return f"{part.file} ({place}) {problem}"
    if part.kind == "jsonl":
        return f"{part.file}:{number + 1 + lines_before(source, part)} {problem}"
    if part.kind == "dataset" and source.streaming:
        return f"{part.file} shard {part.start} row {number + 1} {problem}"
    if part.kind == "webdataset":
        return f"{part.file} sample {number + 1} {problem}"
    first = part.start if part.kind in ("dataset", "csv", "tsv") else _rows_before(place, source, part)
    return f"{part.file} row {first + number + 1} {problem}"


def limited(place: str, source: SourceConfig, shards: list[list[Part]]) -> list[list[Part]]:
    """The shards up to the document in which `max_bytes` of text are reached. To find it, that much text is read."""
    if source.max_bytes is None:
        return shards
    read_bytes = 0
    chosen: list[list[Part]] = []
    for group in shards:
        chosen.append([])
        for part in group:
            for record in read(place, source, part):
                if record.problem is not None or not record.text:
                    continue
                read_bytes += len(record.text.encode())
                if read_bytes >= source.max_bytes:
                    chosen[-1].append(replace(part, records=record.number + 1))
                    return chosen
            chosen[-1].append(part)
    return chosen


def _cut_file(place: str, source: SourceConfig, file: File, kind: str, shard_bytes: int) -> list[Part]:
    """Parts of a large file; an empty list if it cannot be cut."""
    if is_compressed(file.name):
        return []
    if kind == "jsonl":
        count = -(-file.size // shard_bytes)
        bounds: list[Any] = [*(file.size * i // count for i in range(count)), None]
        return [
            _part(file, kind, (stop or file.size) - start, start, stop) for start, stop in itertools.pairwise(bounds)
        ]
    if kind == "parquet":
        bounds, size, sizes = [0], 0, []
        groups = child.groups(place, source, file.name)
        for group, (_, group_bytes) in enumerate(groups, start=1):
            size += group_bytes
            if size >= shard_bytes and group < len(groups):
                bounds.append(group)
                sizes.append(size)
                size = 0
        sizes.append(size)
        pairs = itertools.pairwise([*bounds, len(groups)])
        return [_part(file, kind, size, start, stop) for size, (start, stop) in zip(sizes, pairs, strict=True)]
    return []


def _part(file: File, kind: str, size: int, start: int, stop: int | None) -> Part:
    return Part(file=file.name, kind=kind, size=size, file_size=file.size, start=start, stop=stop)


def _cut_set(place: str, source: SourceConfig, shard_bytes: int) -> list[list[Part]]:
    facts = child.facts(place, source)
    name = f"{source.path}/{source.config or 'default'}/{source.split}"
    if source.streaming:
        return [[Part(name, "dataset", size=0, file_size=0, start=shard)] for shard in range(facts.shards)]
    count = max(1, min(facts.rows, -(-facts.bytes // shard_bytes)))
    bounds = [facts.rows * i // count for i in range(count + 1)]
    return [
        [Part(name, "dataset", size=facts.bytes // count, file_size=0, start=start, stop=stop)]
        for start, stop in itertools.pairwise(bounds)
    ]


def _rows_before(place: str, source: SourceConfig, part: Part) -> int:
    return sum(rows for rows, _ in child.groups(place, source, part.file)[: part.start])
