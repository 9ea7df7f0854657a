"""Finds the files of a source and reads their bytes, with limits.

A path is a file, a folder or a glob, local or behind a protocol (`s3://`, `gs://`, `https://`, `hf://`, `memory://`, ...).
`{000..063}` and `{a,b}` stand for several paths, also on servers that cannot list files. Two kinds of names are special to
this project: `package:NAME` is a corpus shipped with it, `python-stdlib` the source code of the running Python.
"""

import bz2
import functools
import glob
import gzip
import io
import itertools
import logging
import lzma
import os
import re
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow

from data.system.retry import wait_s
from recipes.schema.credentials import without_credentials
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable

CORPORA = Path(__file__).resolve().parents[1] / "corpora"
PACKAGE = "package:"
STDLIB = "python-stdlib"
COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
EXPANSION_FREE_BYTES = 64 << 20
"""Below this many decompressed bytes, the expansion of a file is not checked."""
_EXTRA = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
          "hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs"}  # fmt: skip
"""The package that each protocol needs besides fsspec."""
_MOST_PATHS = 1_000_000
"""Limit for the number of paths that the braces of a path stand for."""
_BLOCK = 1 << 20
_TRIES, _FIRST_WAIT_S = 5, 2.0
"""Tries for remote files. The wait doubles after each."""
log = logging.getLogger(__name__)


class ReadError(DataError):
    """A file cannot be read now. If it is remote, another try may succeed."""


@dataclass(frozen=True)
class File:
    """One file of a source."""

    name: str
    """As shown and stored: a path, a URL without credentials, `package:...` or `python-stdlib/...`."""
    size: int
    """Bytes as stored; 0 if the server does not report the size."""


def find_files(place: str, path: str, *, hidden: list[str] | None = None) -> list[File]:
    """The files a source's path stands for, sorted by name. Raises DataError with `place` if no file matches.

    In folders, files and folders whose names begin with a dot are left out. Their names are added to `hidden`.
    """
    hidden = [] if hidden is None else hidden
    if path == STDLIB:
        found = _standard_library()
    elif path.startswith(PACKAGE):
        found = [File(f"{PACKAGE}{f.name}", f.stat().st_size) for f in _shipped_corpora(place, path)]
    else:
        found = [file for pattern in expand_braces(path) for file in _matching(place, pattern, hidden)]
    return sorted(set(found), key=lambda file: file.name)


def retry_if_remote[T](is_from_server: bool, act: Callable[[], T]) -> T:
    """The value of `act`. If it reads from a server and fails with ReadError, it is tried again. ReadError after the last try."""
    for failures in range(1, _TRIES if is_from_server else 1):
        try:
            return act()
        except ReadError as error:
            pause = wait_s(failures, first_s=_FIRST_WAIT_S)
            log.warning("%s Tried again in %.0f s.", error, pause)
            time.sleep(pause)
    return act()


def is_remote(name: str) -> bool:
    """Whether a name is a URL: of a server, or of another of fsspec's file systems."""
    return "://" in name and not name.startswith("file://")


def file_size(name: str) -> int:
    """Current size of a file in bytes. ReadError if it does not exist."""
    with reading(name):
        if is_remote(name):
            return int(_filesystem(name)[0].info(name).get("size") or 0)
        return local_path(name).stat().st_size
    raise AssertionError("reading() raises")


def local_path(name: str) -> Path:
    """The path of a file that is not remote."""
    if name.startswith(PACKAGE):
        return CORPORA / name.removeprefix(PACKAGE)
    if name.startswith(f"{STDLIB}/"):
        return _stdlib_folder() / name.removeprefix(f"{STDLIB}/")
    return Path(name.removeprefix("file://"))


def plain_suffix(name: str) -> str:
    """The suffix that gives the format: `.jsonl` for `a.jsonl.gz`."""
    parts = Path(name.split("?")[0].lower())
    return Path(parts.stem).suffix if parts.suffix in COMPRESSED else parts.suffix


def is_compressed(name: str) -> bool:
    """Whether a file is decompressed when read."""
    return Path(name.split("?")[0]).suffix.lower() in COMPRESSED


def open_binary(name: str) -> IO[bytes]:
    """A stream of a file's bytes as stored. It is seekable if the server can send parts of files."""
    if is_remote(name):
        filesystem, path = _filesystem(name)
        stream: IO[bytes] = filesystem.open(path, "rb")
        return stream
    return local_path(name).open("rb")


class Plain:
    """A forward stream of a file's decompressed bytes. It counts how many stored bytes were read.

    Raises DataError if the file expands more than `max_expansion` times, because a few bytes can expand to any size.
    """

    def __init__(self, name: str, *, max_expansion: int, start: int = 0) -> None:
        self._name = without_credentials(name)
        self._file = _open_at(name, start)
        self._stored = _Counting(self._file)
        self._max_expansion = max_expansion
        plain: Any = self._stored
        self._suffix = Path(name.split("?")[0]).suffix.lower()
        match self._suffix:
            case ".gz":
                plain = gzip.GzipFile(fileobj=io.BufferedReader(self._stored, _BLOCK), mode="rb")
            case ".zst" | ".zstd":
                plain = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._stored, "r"), "zstd")
            case ".bz2":
                plain = _Members(self._stored, bz2.BZ2Decompressor)
            case ".xz":
                plain = _Members(self._stored, lzma.LZMADecompressor)
        self._plain = plain
        self.lines = io.BufferedReader(_Bounded(self, plain), _BLOCK)
        """The decompressed bytes. `readline` takes a limit."""

    def read_up_to(self, limit: int) -> bytes:
        """The next `limit` bytes, or fewer at the end. Uses memory for the bytes that exist, not for `limit`."""
        blocks = []
        while limit > 0:
            block = self.lines.read(min(limit, _BLOCK))
            if not block:
                break
            blocks.append(block)
            limit -= len(block)
        return b"".join(blocks)

    @property
    def stored_bytes(self) -> int:
        """Stored bytes read so far. Because of buffering, some of them were not yet returned."""
        return self._stored.count

    def check_end(self) -> None:
        """DataError for a compressed file of 0 bytes: whatever wrote it did not finish."""
        if self._suffix in COMPRESSED and not self._stored.count:
            raise DataError(
                f"{self._name} is 0 bytes long, but a valid {self._suffix} file is never empty. Make it again, or remove it."
            )

    def check(self, given: int) -> None:
        """DataError if `given` decompressed bytes are too many for the stored bytes read."""
        check_expansion(self._name, given, self._stored.count, self._max_expansion)

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()


def check_expansion(name: str, given: int, stored: int, most: int) -> None:
    """DataError if `stored` bytes gave more than `most` times as many. Not checked below EXPANSION_FREE_BYTES."""
    if given > EXPANSION_FREE_BYTES and given > most * max(1, stored):
        raise DataError(
            f"{name} expands more than max_expansion={most} times: {given:,} bytes from {stored:,}. Leave it out, or raise "
            f"max_expansion of this source if the file is right."
        )


def _open_at(name: str, start: int) -> IO[bytes]:
    """A stream of a file's bytes from `start` on, also from a server that sends whole files only."""
    stream = open_binary(name)
    if start == 0:
        return stream
    try:
        stream.seek(start)
        if is_remote(name):  # some servers fail only at the first read
            stream.read(1)
            stream.seek(start)
    except (OSError, ValueError, NotImplementedError):
        if not is_remote(name):
            raise
        stream.close()
        filesystem, path = _filesystem(name)
        stream = filesystem.open(path, "rb", block_size=0)
        while start > 0:
            block = stream.read(min(start, _BLOCK))
            if not block:
                break
            start -= len(block)
    return stream


@contextmanager
def reading(name: str) -> Iterator[None]:
    """A context manager that turns any failure to read a file into a ReadError with its name, without credentials."""
    shown = without_credentials(name)
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise ReadError(f"{shown} cannot be read: {without_credentials(str(error)) or type(error).__name__}") from error
    except Exception as error:  # each of fsspec's file systems has its own errors
        if not is_remote(name):
            raise
        why = f"{type(error).__name__}: {without_credentials(str(error))}"
        raise ReadError(f"{shown} cannot be read: {why}") from error


def expand_braces(path: str) -> list[str]:
    """`a{0..2}{x,y}` -> six paths. Numbers keep their width (`{000..063}`). DataError for no path, or too many."""
    parts = re.split(r"(\{[^{}]*\})", path)
    choices: list[Sequence[str]] = []
    many = 1
    for part in parts:
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if span:
            first, last = span.groups()
            numbers = range(int(first), int(last) + 1)
            many *= len(numbers) if len(last) < 19 else _MOST_PATHS + 1
            choices.append([str(n).zfill(len(first)) for n in numbers[:_MOST_PATHS]])
        elif part.startswith("{") and "," in part:
            many *= part.count(",") + 1
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
        if not 0 < many <= _MOST_PATHS:
            raise DataError(
                f"{part} in {printable(path, most=300)} makes {many:,} paths, but must make 1 to {_MOST_PATHS:,}. Write "
                f"the smaller number first, or use a glob."
            )
    return ["".join(picked) for picked in itertools.product(*choices)]


class _Counting(io.RawIOBase):
    """A stream that counts the bytes read from it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self.count += len(content)
        return len(content)


class _Members:
    """The content of all members of a .bz2 or .xz file.

    Python's own readers mistake a damaged or padded later member for the end of the file, and drop the rest silently.
    """

    def __init__(self, stored: _Counting, decompressor: Callable[[], Any]) -> None:
        self._stored, self._new = stored, decompressor
        self._member = decompressor()
        self._waiting = b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; no bytes at the end. EOFError if a member is cut short."""
        while True:
            if self._member.eof:
                self._waiting = (self._waiting + self._member.unused_data).lstrip(b"\0")  # .xz may be padded
                while not self._waiting:
                    block = self._stored.read(_BLOCK)
                    if not block:
                        return b""
                    self._waiting = block.lstrip(b"\0")
                self._member = self._new()
            elif self._member.needs_input and not self._waiting:
                self._waiting = self._stored.read(_BLOCK) or b""
                if not self._waiting:
                    if not self._stored.count:
                        return b""
                    raise EOFError("it ends inside a compressed stream")
            content: bytes = self._member.decompress(self._waiting, max_length=size)
            self._waiting = b""
            if content:
                return content


class _Bounded(_Counting):
    """Decompressed bytes. Each read checks the expansion."""

    def __init__(self, owner: Plain, stream: Any) -> None:
        super().__init__(stream)
        self._owner = owner

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        if not size:
            self._owner.check_end()
        self._owner.check(self.count)
        return size


def _matching(place: str, pattern: str, hidden: list[str]) -> list[File]:
    if is_remote(pattern):
        return _matching_remote(place, pattern, hidden)
    path = pattern.removeprefix("file://")
    if Path(path).is_dir():
        files = _in_folder(path, hidden)
    elif Path(path).is_file():
        files = [path]
    else:
        files = _in_glob(path)
    if not files:
        more = f" except {len(hidden):,} whose names begin with a dot" if hidden else ""
        raise DataError(
            f"{place}={pattern}: no file there{more} (looked from {Path.cwd()}). Give a file, a folder, or a glob such as "
            f"texts/*.jsonl."
        )
    return [File(f, Path(f).stat().st_size) for f in files]


def _in_folder(folder: str, hidden: list[str]) -> list[str]:
    """Every file below a folder. Follows links, and lists each real file once. DataError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}. Make it readable, or choose a path without it."
        )

    files, folders = [], {os.path.realpath(folder)}
    for here, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        hidden += [str(Path(here, name)) for name in [*below, *names] if name.startswith(".")]
        visited = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(here, name))
            if not name.startswith(".") and real not in folders:
                folders.add(real)
                visited.append(name)
        below[:] = visited
        files += [os.path.join(here, name) for name in names if not name.startswith(".")]
    return _without_duplicates([name for name in files if os.path.isfile(name)])


def _in_glob(pattern: str) -> list[str]:
    for parent in Path(pattern).parents:
        for folder in glob.iglob(str(parent), recursive=True) if glob.has_magic(str(parent)) else [str(parent)]:
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                raise DataError(f"{folder} cannot be read, so {pattern} may miss files. Make it readable.")
    found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    return _without_duplicates(found) if "**" in pattern else found


def _without_duplicates(names: list[str]) -> list[str]:
    """One name for each real file: the shortest."""
    by_real_path: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (name.count("/"), len(name), name)):
        by_real_path.setdefault(os.path.realpath(name), name)
    return list(by_real_path.values())


def _matching_remote(place: str, pattern: str, hidden: list[str]) -> list[File]:
    shown = without_credentials(pattern)
    try:
        filesystem, path = _filesystem(pattern)
    except DataError as error:
        raise DataError(f"{place}={shown}: {without_credentials(str(error))}") from error
    with reading(pattern):
        why = ""
        try:
            if glob.has_magic(path):
                found = filesystem.glob(path, detail=True)
            else:
                facts = filesystem.info(path)
                found = filesystem.find(path, detail=True) if facts.get("type") == "directory" else {path: facts}
        except FileNotFoundError as error:
            # fsspec raises this also for a server that does not answer, so show the cause
            found, why = {}, f" ({without_credentials(str(error.__cause__ or error))})"
    base = "" if glob.has_magic(path) else path.rstrip("/")
    files = []
    for name, info in found.items():
        if info.get("type", "file") != "file":
            continue
        inside = name.removeprefix(base) if base and name != base else name.rsplit("/", 1)[-1]
        if any(part.startswith(".") for part in inside.split("?")[0].split("/")):
            hidden.append(name)
        else:
            files.append(File(without_credentials(filesystem.unstrip_protocol(name)), int(info.get("size") or 0)))
    if not files:
        raise DataError(f"{place}={shown}: no file there{why}. Give a file, a folder, or a glob.")
    return files


def _filesystem(name: str) -> tuple[Any, str]:
    protocol = name.split("://", 1)[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(name)
    except ImportError as error:
        needed = _EXTRA.get(protocol)
        hint = f"pip install {needed}" if needed else str(error)
        raise DataError(f"reading {protocol}:// needs a package that is not installed. Install it: {hint}") from error
    except ValueError as error:
        raise DataError(f"{error}. Use a known protocol: file, s3, gs, http, https, hf, ...") from error
    return filesystem, path


@functools.cache
def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])  # cached: it takes a millisecond, and every file needs it


def _standard_library() -> list[File]:
    folder = _stdlib_folder()
    skipped = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")
    inside = ((f, f.relative_to(folder)) for f in folder.rglob("*.py"))
    found = [
        File(f"{STDLIB}/{name}", f.stat().st_size)
        for f, name in inside
        if not any(part in skipped for part in name.parts)
    ]
    return [file for file in found if file.size]


def _shipped_corpora(place: str, path: str) -> list[Path]:
    files = sorted(CORPORA.glob(path.removeprefix(PACKAGE) + ".*"))
    if not files:
        shipped = ", ".join(sorted({f.name.split(".")[0] for f in CORPORA.glob("*.gz")}))
        raise DataError(f"{place}={path}: no such corpus is shipped. Use one of {shipped}.")
    return files
