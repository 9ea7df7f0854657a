"""Reads parquet files and `datasets` sets in a child process. If a damaged file crashes the library, only the child ends.

    this process --fork--> child: reads, --blocks of plain values--> this process

The child's memory is limited, so a small file that decodes to gigabytes is an error too. (Damaged parquet footers abort
Arrow, and a dictionary can repeat one long value for every row.)
"""

import faulthandler
import marshal
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import IO, Any, NoReturn

from data.sources.files import ReadError
from data.sources.records import Part, Record, read_part, row_groups
from data.sources.sets import SetFacts, read_set, set_facts
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable

_MEMORY_BYTES = 3 << 30
"""Memory the child may allocate, in addition to four records of the largest size. Mapped files do not count."""
_RECORDS_PER_BLOCK, _MEDIA_PER_BLOCK = 64, 1


def records(place: str, source: SourceConfig, part: Part) -> Iterator[Record]:
    """The records of a part of a parquet file or a set. Raises as `read_part` and `read_set`; DataError if the child dies."""
    for block in _ask("records", place, source, part, what=part.file):
        yield from (Record(*record) for record in block)


def groups(place: str, source: SourceConfig, file: str) -> list[tuple[int, int]]:
    """(rows, stored bytes) of the row groups of a parquet file. Raises as `records`."""
    return [pair for block in _ask("groups", place, source, file, what=file) for pair in block]


def facts(place: str, source: SourceConfig) -> SetFacts:
    """`set_facts`, called in the child. Raises as `records`."""
    (block,) = _ask("facts", place, source, None, what=source.path)
    return SetFacts(*block)


def _ask(function: str, place: str, source: SourceConfig, argument: Any, *, what: str) -> Iterator[Any]:
    """The blocks that a function in the child yields. The child is a fork: it starts in milliseconds and has one thread."""
    ours, theirs = os.pipe()
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.close(ours)
            _serve(theirs, errors.fileno(), function, place, source, argument)
        os.close(theirs)
        has_ended = False
        with open(ours, "rb") as stream:
            try:
                while (message := _receive(stream)) is not None:
                    kind, content = message
                    match kind:
                        case "end":
                            return
                        case "error":
                            raise DataError(content)
                        case "read error":
                            raise ReadError(content)
                    yield content
                status, has_ended = os.waitpid(child, 0)[1], True
            finally:
                if not has_ended:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
        errors.seek(0)
        lines = errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        why = f": {printable(lines[-1], most=200)}" if lines else ""
        raise DataError(
            f"{what} ({place}) cannot be read: the library that reads it ended its process (exit status "
            f"{os.waitstatus_to_exitcode(status)}{why}). The file is damaged, or decodes to too much memory. Make it again, or "
            f"leave it out."
        )


def _serve(out: int, errors: int, function: str, place: str, source: SourceConfig, argument: Any) -> NoReturn:
    """The child process: writes the blocks and ends the process."""
    try:
        faulthandler.disable()
        for stream in (1, 2):  # the library's last words go into the parent's message
            os.dup2(errors, stream)
        _limit_memory(_MEMORY_BYTES + 4 * source.max_record_bytes)
        with open(out, "wb") as pipe:
            _send(pipe, *_last_message(pipe, function, place, source, argument))
    except BrokenPipeError:  # the parent needs no more blocks
        pass
    except BaseException:
        os.write(errors, traceback.format_exc().strip().rsplit("\n", 1)[-1].encode(errors="replace"))
        os._exit(1)
    os._exit(0)  # skips the libraries' clean-up, which may crash after a damaged file


def _last_message(pipe: IO[bytes], function: str, place: str, source: SourceConfig, argument: Any) -> tuple[str, Any]:
    try:
        for block in _answer(function, place, source, argument):
            _send(pipe, "block", block)
        return "end", None
    except ReadError as error:
        return "read error", str(error)
    except DataError as error:
        return "error", str(error)
    except MemoryError:
        name = argument.file if isinstance(argument, Part) else argument or source.path
        return "error", f"{name} ({place}): a row takes more memory than its reader may use. Leave the file out."


def _answer(function: str, place: str, source: SourceConfig, argument: Any) -> Iterator[Any]:
    match function:
        case "groups":
            yield row_groups(place, source, argument)
        case "facts":
            found = set_facts(place, source)
            yield (found.rows, found.bytes, found.shards)
        case _:
            part: Part = argument
            read = read_set if part.kind == "dataset" else read_part
            size = _MEDIA_PER_BLOCK if source.kind == "media" else _RECORDS_PER_BLOCK
            for some in batched(read(place, source, part), size):
                yield [(record.number, record.text, record.problem, record.stored_bytes) for record in some]


def _limit_memory(more: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + more, used + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _send(out: IO[bytes], kind: str, content: Any) -> None:
    message = marshal.dumps((kind, content))
    out.write(len(message).to_bytes(8, "little") + message)
    out.flush()


def _receive(stream: IO[bytes]) -> Any:
    """The next message; None if the child ended without sending one."""
    size = stream.read(8)
    content = stream.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    return marshal.loads(content) if content and len(content) == int.from_bytes(size, "little") else None
