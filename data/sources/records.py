"""Reads the texts of one part of a file: a text file, lines of jsonl, row groups of parquet, rows of csv and tsv.

    Part --read_part--> Record(number, text)  or  Record(number, problem), one for every line or row, in order

A bad record contains its problem, and the caller decides what to do. A bad file raises DataError.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from string import Formatter
from typing import Any

import pyarrow
import pyarrow.parquet

from data.chat.preferences import FIELDS, preference_text_of
from data.chat.record import chat_of
from data.media.record import FIELDS as MEDIA_FIELDS
from data.media.record import Fetch, folder_fetch, media_of
from data.sources.files import Plain, check_expansion, is_remote, local_path, open_binary, reading
from data.sources.tars import read_tar
from recipes.schema.credentials import with_credentials
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import parse_json, printable

_ROWS, _MEDIA_ROWS = 64, 4
"""Rows of parquet decoded at a time. Rows with media are large."""


@dataclass(frozen=True)
class Part:
    """A file, or a range of a file, that is read independently of the others."""

    file: str
    """Name of the file, or of the set."""
    kind: str
    """`text`, `jsonl`, `parquet`, `csv`, `tsv`, `webdataset`, `dataset` or `megatron`."""
    size: int
    """Stored bytes of this part, for progress; 0 if unknown."""
    file_size: int
    """Size of the whole file when the plan was made; 0 if unknown."""
    start: int = 0
    """First byte (jsonl), row group (parquet), row (a set on disk) or shard (a streamed set)."""
    stop: int | None = None
    """Start of the next part, in the unit of `start`; None: read to the end."""
    records: int | None = None
    """Read at most this many records; None: all."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line or row: its text, or its problem."""

    number: int
    """Number in its part, from 0."""
    text: str
    problem: str | None = None
    """Why it cannot be used, as the rest of a sentence about the record."""
    stored_bytes: int = 0
    """Bytes of the part read so far, for progress."""


def read_part(
    place: str, source: SourceConfig, part: Part, *, extract: Callable[[Any], str] | None = None
) -> Iterator[Record]:
    """The records of one part of a file. place: dotted key of the source, for messages. extract: of a jsonl file, from a record
    to its text, instead of the source's `text_of`."""
    with reading(part.file):
        match part.kind:
            case "text":
                yield _text(source, part)
            case "jsonl":
                yield from _jsonl(source, part, extract or text_of(source, fetch=_fetch(source, part)))
            case "parquet":
                yield from _parquet(place, source, part)
            case "csv" | "tsv":
                yield from _csv(place, source, part)
            case "webdataset":
                yield from _tar(place, source, part)
            case _:
                raise AssertionError(part.kind)


def text_of(source: SourceConfig, *, is_table: bool = False, fetch: Fetch | None = None) -> Callable[[Any], str]:
    """A function from a record to its text, by the source's field or template; of a chat or a preference, its messages as JSON
    (is_table: see `chat_of`); of a media record its parts (fetch: see `media_of`). It raises ValueError with the problem."""
    if source.kind == "media":
        return media_of(source, fetch=fetch)
    if source.kind == "chat":
        return chat_of(source, is_table=is_table)
    if source.kind == "preference":
        return preference_text_of(source, is_table=is_table)
    if source.template is None:
        return lambda record: _plain_text(record, source.text_field)
    try:
        parsed = list(Formatter().parse(source.template))
    except ValueError as error:
        raise DataError(f"template={source.template!r} cannot be read: {error}. Write it as {{field}} text.") from error
    pieces = [(literal, name) for literal, name, *_ in parsed]
    if any(how or conversion or name == "" for _, name, how, conversion in parsed):
        raise DataError(
            f"template={source.template!r} has more in braces than a field name, or nothing. Write {{field}}, and {{{{ for a "
            f"brace."
        )
    if all(name is None for _, name in pieces):
        raise DataError(
            f"template={source.template!r} names no field, so every text would be the same. Write it as {{field}} text."
        )
    return lambda record: "".join(
        literal + (_in_template(record, name) if name is not None else "") for literal, name in pieces
    )


def columns_of(place: str, source: SourceConfig, names: list[str], what: str) -> list[str]:
    """The columns that a source's text is made of. DataError if one is missing.

    names: the columns of the table; what: the table, for the message.
    """
    wanted = [source.text_field]
    if source.kind == "preference":
        wanted = [field for field in (*FIELDS, source.tools_field) if field in names]
        if not ({"chosen", "rejected"} <= set(names) or {"context", "completions"} <= set(names)):
            raise DataError(
                f"{what} has no columns chosen and rejected, and no context and completions (it has: {', '.join(names)}), which "
                f"{place}.kind=preference needs. Rename its columns, or set another kind."
            )
    elif source.kind == "media":
        wanted = [field for field in (source.parts_field, source.text_field, *MEDIA_FIELDS) if field in names]
        if not wanted:
            raise DataError(
                f"{what} has none of the columns {source.parts_field}, {source.text_field}, {', '.join(MEDIA_FIELDS)} (it has: "
                f"{', '.join(names)}), which {place}.kind=media needs. Set parts_field or text_field of {place}."
            )
    elif source.kind == "chat":
        wanted = [source.messages_field, *([source.tools_field] if source.tools_field in names else [])]
    elif source.template is not None:
        wanted = [name for _, name, *_ in Formatter().parse(source.template) if name]
    columns = []
    for name in wanted:
        column = name if name in names else name.split(".")[0]
        if column not in names:
            fields = "messages_field" if source.kind == "chat" else "text_field or template"
            raise DataError(f"{what} has no column {name!r} (it has: {', '.join(names)}). Set {fields} of {place}.")
        columns.append(column)
    return list(dict.fromkeys(columns))


def _plain_text(record: Any, name: str) -> str:
    value = _field(record, name)
    if isinstance(value, bytes):
        raise ValueError(
            f"has bytes under {name!r}, not text: cast the column from binary to string, or set text_field"
        )
    if not isinstance(value, str):
        raise ValueError(f"has {type(value).__name__} under {name!r}, not text")
    return value


def _in_template(record: Any, name: str) -> str:
    value = _field(record, name)
    if isinstance(value, list | tuple | dict | bytes):
        raise ValueError(
            f"has {type(value).__name__} under {name!r}, but a template takes text and numbers. Name a field in it as a.b, or "
            f"write such records as text before preparing"
        )
    return str(value)


def _field(record: Any, name: str) -> Any:
    """The value of a field: by its name, or by a dotted path into nested records."""
    if isinstance(record, dict):
        if record.get(name) is not None:
            return record[name]
        head, _, rest = name.partition(".")
        if rest and isinstance(record.get(head), dict):
            return _field(record[head], rest)
        if name in record:
            raise ValueError(f"has null under {name!r}, not text")
    keys = ", ".join(map(str, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
    raise ValueError(f"has no text under {name!r} (it has: {keys}). Set text_field or template of this source")


def checked(text: str, limit: int) -> str | None:
    """Why a text cannot be used; None if it can."""
    try:
        size = len(text.encode()) if len(text) * 4 > limit or not text.isascii() else 0
    except UnicodeEncodeError as error:
        return f"contains half a character (a lone surrogate) at character {error.start}"
    if size > limit:
        return f"contains {size:,} bytes of text, more than max_record_bytes={limit:,}"
    return None


def _record(number: int, record: Any, extract: Callable[[Any], str], source: SourceConfig, stored: int) -> Record:
    try:
        text = extract(record)
    except ValueError as error:
        return Record(number, "", str(error), stored)
    return Record(number, text, checked(text, source.max_record_bytes), stored)


def _text(source: SourceConfig, part: Part) -> Record:
    limit = source.max_record_bytes
    with Plain(_opened(source, part), max_expansion=source.max_expansion) as plain:
        content = plain.read_up_to(limit + 1)
    if len(content) > limit:
        return Record(0, "", f"is larger than max_record_bytes={limit:,}", part.size)
    try:
        return Record(0, content.decode("utf-8-sig"), None, part.size)
    except UnicodeDecodeError as error:
        return Record(0, "", f"is not UTF-8 text: {error.reason} at byte {error.start}", part.size)


def _jsonl(source: SourceConfig, part: Part, extract: Callable[[Any], str]) -> Iterator[Record]:
    """The lines that begin inside the part. A line that begins before it belongs to the previous part."""
    limit = source.max_record_bytes
    # A key that is written twice could show another chat than the one that is learned. Texts are read faster without that check.
    parse = json.loads if source.kind == "text" else parse_json
    with Plain(_opened(source, part), max_expansion=source.max_expansion, start=max(0, part.start - 1)) as plain:
        place = part.start
        if part.start:  # the stream begins one byte earlier, to see whether a line begins exactly at `start`
            place += _rest_of_line(plain) - 1
        number = -1
        while part.stop is None or place < part.stop:
            line = plain.lines.readline(limit + 1)
            if not line:
                return
            number += 1
            place += len(line)
            if len(line) > limit and not line.endswith(b"\n"):
                place += _rest_of_line(plain)
                yield Record(number, "", f"is a line longer than max_record_bytes={limit:,}", plain.stored_bytes)
                continue
            if number == 0 and part.start == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                yield Record(number, "", None, plain.stored_bytes)
                continue
            try:
                record = parse(line.decode())
            except UnicodeDecodeError as error:
                yield Record(number, "", f"is not UTF-8: {error.reason} at byte {error.start}", plain.stored_bytes)
            except (ValueError, RecursionError) as error:
                yield Record(number, "", f"is not JSON: {error}", plain.stored_bytes)
            else:
                yield _record(number, record, extract, source, plain.stored_bytes)


def _rest_of_line(plain: Plain) -> int:
    """Skip the rest of the current line, with its line end. -> bytes skipped."""
    skipped = 0
    while True:
        piece = plain.lines.readline(1 << 20)
        skipped += len(piece)
        if not piece or piece.endswith(b"\n"):
            return skipped


def lines_before(source: SourceConfig, part: Part) -> int:
    """Number of lines that begin before a part of a file, so that a message can give the line number in the file."""
    lines, left = 0, part.start
    with open_binary(_opened(source, part)) as stream:
        while left > 0:
            block = stream.read(min(left, 1 << 22))
            if not block:
                break
            lines += block.count(b"\n")
            left -= len(block)
            if left == 0 and not block.endswith(b"\n"):
                lines += 1  # the line that begins before the part and ends in it
    return lines


def _tar(place: str, source: SourceConfig, part: Part) -> Iterator[Record]:
    samples = read_tar(place, source, part.file, lambda record, fetch: media_of(source, fetch=fetch)(record))
    for number, (text, problem, stored) in enumerate(samples):
        yield Record(number, text, problem or checked(text, source.max_record_bytes), stored)


def _fetch(source: SourceConfig, part: Part) -> Fetch | None:
    """Reads the files that a part's records name, relative to its folder; None behind a URL."""
    if source.kind != "media" or is_remote(part.file):
        return None
    return folder_fetch(local_path(part.file).parent, most_bytes=source.max_record_bytes)


def _csv(place: str, source: SourceConfig, part: Part) -> Iterator[Record]:
    """The rows of a table. Its first line gives the names of the columns."""
    limit = source.max_record_bytes
    extract = text_of(source, fetch=_fetch(source, part))
    with Plain(_opened(source, part), max_expansion=source.max_expansion) as plain:

        def lines() -> Iterator[str]:
            while line := plain.lines.readline(limit + 1):
                if len(line) > limit and not line.endswith(b"\n"):
                    raise DataError(f"{part.file} ({place}) has a line longer than max_record_bytes={limit:,}.")
                yield line.decode("utf-8")

        csv.field_size_limit(limit)
        number = -1
        try:
            # The mark that Windows editors put before the first name would make the quotes of that name part of it.
            whole = lines()
            first = [line.removeprefix("\ufeff") for line in itertools.islice(whole, 1)]
            rows = csv.reader(itertools.chain(first, whole), delimiter="\t" if part.kind == "tsv" else ",", strict=True)
            names = next(rows, [])
            columns_of(place, source, names, part.file)
            for number, row in enumerate(rows):
                if len(row) != len(names):
                    problem = f"has {len(row)} fields, but the first line names {len(names)}"
                    yield Record(number, "", problem if row else None, plain.stored_bytes)
                    continue
                yield _record(number, dict(zip(names, row, strict=True)), extract, source, plain.stored_bytes)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{part.file} row {number + 2} ({place}) cannot be read as a table: {error}. Close its quotes, or convert it to "
                f"UTF-8."
            ) from error


def _opened(source: SourceConfig, part: Part) -> str:
    """The name to open a part's file by, with the credentials of the source's path."""
    return with_credentials(part.file, source.path)


def _parquet(place: str, source: SourceConfig, part: Part) -> Iterator[Record]:
    extract = text_of(source, is_table=True, fetch=_fetch(source, part))
    with open_binary(_opened(source, part)) as stream:
        table = _parquet_file(place, part.file, stream)
        columns = columns_of(place, source, table.schema_arrow.names, part.file)
        # Read dictionary-encoded columns as dictionaries, so that a value that every row repeats is in memory once.
        texts = [name for name in columns if _is_text(table.schema_arrow.field(name).type)]
        table = _parquet_file(place, part.file, stream, read_dictionary=texts)
        groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
        done = number = given = 0
        for group in groups:
            _check_expansion(table, group, source, part)
            stored = done + _group_bytes(table, group)
            rows = _MEDIA_ROWS if source.kind == "media" else _ROWS
            for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False):
                for values in zip(*batch.columns, strict=True):
                    record = _row(number, dict(zip(batch.schema.names, values, strict=True)), extract, source, done)
                    number += 1
                    given += len(record.text)
                    check_expansion(part.file, given, stored, source.max_expansion)
                    yield record
            done = stored


def _parquet_file(place: str, name: str, stream: Any, **options: Any) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20, **options)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = printable(str(error), most=300)
        raise DataError(
            f"{name} ({place}) cannot be read as parquet: {why.rstrip('.')}. Make it again, or leave it out."
        ) from error


def _is_text(kind: Any) -> bool:
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind))


def _row(
    number: int, scalars: dict[str, Any], extract: Callable[[Any], str], source: SourceConfig, stored: int
) -> Record:
    try:
        row = {name: scalar.as_py() for name, scalar in scalars.items()}
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time outside of Python's range
        return Record(number, "", f"has a value that cannot be read: {printable(str(error), most=200)}", stored)
    return _record(number, row, extract, source, stored)


def row_groups(place: str, source: SourceConfig, file: str) -> list[tuple[int, int]]:
    """(rows, stored bytes) of each row group of a parquet file. DataError if the file cannot be read."""
    with reading(file), open_binary(with_credentials(file, source.path)) as stream:
        table = _parquet_file(place, file, stream)
        numbers = range(table.num_row_groups)
        return [(table.metadata.row_group(group).num_rows, _group_bytes(table, group)) for group in numbers]


def _group_bytes(table: Any, group: int) -> int:
    facts = table.metadata.row_group(group)
    return sum(max(0, facts.column(index).total_compressed_size) for index in range(facts.num_columns))


def _check_expansion(table: Any, group: int, source: SourceConfig, part: Part) -> None:
    plain = table.metadata.row_group(group).total_byte_size
    check_expansion(f"{part.file} row group {group}", plain, _group_bytes(table, group), source.max_expansion)
