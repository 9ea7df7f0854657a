"""Documents out of files: text, jsonl and parquet, plain or compressed, local, shipped or of this machine's Python.

    SourceConfig --documents--> Document(text, file, ordinal), in an order that depends on the files' names only

Every problem is a DataError with file (and line), before anything downstream has seen half a document.
"""

import glob
import gzip
import io
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.config import SourceConfig
from data.errors import DataError

CORPORA = Path(__file__).resolve().parent / "corpora"
PACKAGE = "package:"
STDLIB = "python-stdlib"
_FORMATS = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    text: str
    file: str
    ordinal: int
    """Number of the document in its file, from 0."""


def documents(name: str, source: SourceConfig) -> Iterator[Document]:
    """The documents of one source, up to `max_bytes` of UTF-8 text. Empty texts are left out.

    Raises DataError for a path without files, an unreadable or undecodable file, a bad record, or a source without text.
    """
    read = count = 0
    for file in source_files(name, source):
        for ordinal, text in enumerate(_texts(name, source, file)):
            if not text:
                continue
            yield Document(text=text, file=str(file), ordinal=ordinal)
            count += 1
            read += len(text.encode())
            if source.max_bytes is not None and read >= source.max_bytes:
                return
    if count == 0:
        raise DataError(f"data.sources.{name}.path={source.path} holds no text: every document is empty.")


def source_files(name: str, source: SourceConfig) -> list[Path]:
    """The files of a source, sorted by name. DataError where there are none."""
    path = source.path
    if path == STDLIB:
        folder = Path(sysconfig.get_paths()["stdlib"])
        skipped = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")
        files = [f for f in folder.rglob("*.py") if not any(part in skipped for part in f.relative_to(folder).parts)]
        files = [f for f in files if f.stat().st_size > 0]
    elif path.startswith(PACKAGE):
        files = sorted(CORPORA.glob(path.removeprefix(PACKAGE) + ".*"))
        if not files:
            shipped = ", ".join(sorted({f.name.split(".")[0] for f in CORPORA.glob("*.gz")}))
            raise DataError(f"data.sources.{name}.path={path}: no such corpus is shipped. There are: {shipped}.")
    elif Path(path).is_dir():
        files = [f for f in Path(path).rglob("*") if f.is_file() and not f.name.startswith(".")]
    else:
        files = [Path(f) for f in glob.glob(path, recursive=True) if Path(f).is_file()]
    if not files:
        raise DataError(
            f"data.sources.{name}.path={path}: no file there (looked from {Path.cwd()}). Give a file, a folder, or a "
            f"glob such as texts/*.jsonl."
        )
    return sorted(files)


def _texts(name: str, source: SourceConfig, file: Path) -> Iterator[str]:
    plain = file.with_suffix("") if file.suffix in (".gz", ".zst") else file
    kind = source.format if source.format != "auto" else _FORMATS.get(plain.suffix, "text")
    try:
        match kind:
            case "parquet":
                yield from _parquet_texts(source, file)
            case "jsonl":
                with _open(file) as lines:
                    yield from _jsonl_texts(source, file, lines)
            case _:
                with _open(file) as whole:
                    yield whole.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} (data.sources.{name}) is not UTF-8 text: {error.reason} at byte {error.start}. Convert it, or leave "
            f"it out of the path."
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"{file} (data.sources.{name}) cannot be read: {error}") from error


def _open(file: Path) -> IO[str]:
    match file.suffix:
        case ".gz":
            return gzip.open(file, "rt", encoding="utf-8", newline="")
        case ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise DataError(f"{file} is zstd-compressed: install the package `zstandard`, or use .gz.") from error
            raw: Any = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), closefd=True)
            return io.TextIOWrapper(raw, encoding="utf-8", newline="")
        case _:
            return file.open("r", encoding="utf-8", newline="")


def _jsonl_texts(source: SourceConfig, file: Path, lines: IO[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number} is not JSON: {error}") from error
        text = record.get(source.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{file}:{number} has no text under {source.text_field!r} (it has: {keys}). Set text_field of this source."
            )
        yield text


def _parquet_texts(source: SourceConfig, file: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        if source.text_field not in table.schema_arrow.names:
            raise DataError(
                f"{file} has no column {source.text_field!r} (it has: {', '.join(table.schema_arrow.names)}). Set "
                f"text_field of this source."
            )
        for batch in table.iter_batches(columns=[source.text_field]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str):
                    raise DataError(f"{file}: column {source.text_field!r} holds {type(value).__name__}, not text.")
                yield value
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read as parquet: {error}") from error
