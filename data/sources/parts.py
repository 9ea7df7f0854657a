"""A source -> the work of each of its shards: lists of parts, decided once, before anything is read.

    files or rows --cut at about shard_bytes--> [[Part, ...], ...]

The cut depends on the names and sizes of the files only, so the shards come out the same with any number of workers and
tasks. A large file is cut where its format allows it: jsonl at line ends, parquet between row groups, a set between rows.
Compressed files and text files are read whole.
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
"""Files of one shard at most, however small they are."""
_KINDS = {".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".py": "text", ".jsonl": "jsonl", ".json": "jsonl",
          ".ndjson": "jsonl", ".jsonlines": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv"}  # fmt: skip


def cut(place: str, source: SourceConfig, shard_bytes: int, *, hidden: list[str] | None = None) -> list[list[Part]]:
    """The parts of each shard of a source. DataError if the source cannot be found or opened. hidden: see `find_files`."""
    if is_set(source):
        return _cut_set(place, source, shard_bytes)
    if source.streaming:
        raise DataError(f"{place}.streaming is for sets of the Hub (path hf:NAME); {source.path} is read as it comes.")
    shards: list[list[Part]] = []
    group: list[Part] = []
    grouped = 0
    for file in find_files(place, source.path, hidden=hidden):
        kind = kind_of(place, source, file)
        pieces = _cut_file(place, source, file, kind, shard_bytes) if file.size > shard_bytes * 3 // 2 else []
        if len(pieces) > 1:
            shards += [group] if group else []
            group, grouped = [], 0
            shards += [[piece] for piece in pieces]
            continue
        group.append(Part(file=file.name, kind=kind, size=file.size, file_size=file.size))
        grouped += file.size or (shard_bytes if is_remote(file.name) else 0)  # a size that is not told may be any
        if grouped >= shard_bytes or len(group) == MAX_FILES:
            shards.append(group)
            group, grouped = [], 0
    return [*shards, group] if group else shards


def kind_of(place: str, source: SourceConfig, file: File) -> str:
    """How a file is read. DataError if its name does not tell and nobody says."""
    kind = source.format if source.format != "auto" else _KINDS.get(plain_suffix(file.name))
    if kind is None:
        raise DataError(
            f"{file.name} ({place}) is of no kind that its name tells. Set {place}.format (text: the whole file is one document; "
            f"jsonl, csv, ...), or give a path that leaves it out, such as a glob of *.jsonl. Known: {', '.join(_KINDS)}, each "
            f"also compressed."
        )
    if kind == "text" and source.kind == "chat":
        raise DataError(
            f"{file.name} ({place}) is a text file, and {place}.kind=chat needs records with messages. Set {place}.format, or "
            f"give a path of jsonl or parquet files."
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
    """A bad record's message: file, line or row (from 1), what is wrong."""
    if part.kind == "text":
        return f"{part.file} ({place}) {problem}"
    if part.kind == "jsonl":
        return f"{part.file}:{number + 1 + lines_before(source, part)} {problem}"
    if part.kind == "dataset" and source.streaming:
        return f"{part.file} shard {part.start} row {number + 1} {problem}"
    first = part.start if part.kind in ("dataset", "csv", "tsv") else _rows_before(place, source, part)
    return f"{part.file} row {first + number + 1} {problem}"


def limited(place: str, source: SourceConfig, shards: list[list[Part]]) -> list[list[Part]]:
    """The shards cut off where `max_bytes` of text are reached (whole documents): reads that much, once."""
    if source.max_bytes is None:
        return shards
    read_bytes = 0
    kept: list[list[Part]] = []
    for group in shards:
        kept.append([])
        for part in group:
            for record in read(place, source, part):
                if record.problem is not None or not record.text:
                    continue
                read_bytes += len(record.text.encode())
                if read_bytes >= source.max_bytes:
                    kept[-1].append(replace(part, records=record.number + 1))
                    return kept
            kept[-1].append(part)
    return kept


def _cut_file(place: str, source: SourceConfig, file: File, kind: str, shard_bytes: int) -> list[Part]:
    """Parts of a large file; an empty list where it is read whole."""
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
