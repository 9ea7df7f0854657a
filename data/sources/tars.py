"""Samples of WebDataset tar files: members of one name up to its first dot, one after the other, are one record.

    a/001.jpg  a/001.txt  a/002.wav  a/002.json    ->    {"image": jpg, "text": txt}, {"audio": wav, **json}

Media come in the order of the tar, then the text (`.txt`), unless a `.json` says otherwise: its fields are the record, and paths
in it name members of its sample (`001.jpg`, or `jpg`). Members of other kinds are not read, and nothing is unpacked to disk.
"""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from data.media.record import FIELDS, KINDS, Fetch
from data.sources.files import Plain
from recipes.schema.credentials import with_credentials
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import parse_json, printable

_KINDS = {
    "jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "bmp": "image", "tif": "image", "tiff": "image",
    "gif": "image", "wav": "audio", "flac": "audio", "ogg": "audio", "opus": "audio", "mp3": "audio", "mp4": "video",
    "mov": "video", "m4v": "video", "mkv": "video", "webm": "video", "avi": "video", "txt": "text", "json": "json",
}  # fmt: skip
"""By suffix: what a member is. Others are not read."""


def read_tar(
    place: str, source: SourceConfig, file: str, extract: Callable[[Any, Fetch], str]
) -> Iterator[tuple[str, str | None, int]]:
    """(text, problem, stored bytes read) of each sample. extract: from a record, and its members, to its text; ValueError says
    what is wrong. DataError for a tar file that is damaged."""
    name = with_credentials(file, source.path)
    with Plain(name, max_expansion=source.max_expansion) as plain:
        for key, members in _samples(place, source, file, plain):
            try:
                if isinstance(members, str):
                    raise ValueError(members)
                text, problem = extract(_record(members, source), _fetch(key, members)), None
            except ValueError as error:
                text, problem = "", f"({printable(key, most=120)}) {error}"
            yield text, problem, plain.stored_bytes


def _samples(place: str, source: SourceConfig, file: str, plain: Plain) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """(key, members by suffix) of each sample, or (key, problem)."""
    key: str | None = None
    members: dict[str, bytes] | str = {}
    size = 0
    try:
        with tarfile.open(fileobj=plain.lines, mode="r|") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, suffix = path.name.partition(".")
                if not member.isreg() or not stem or suffix.rpartition(".")[2].lower() not in _KINDS:
                    continue
                here = str(path.parent / stem)
                if here != key:
                    if key is not None:
                        yield key, members
                    key, members, size = here, {}, 0
                size += member.size
                if size > source.max_record_bytes:
                    members = f"has {size:,} bytes or more, and max_record_bytes={source.max_record_bytes:,}"
                if isinstance(members, str):
                    continue
                stream = tar.extractfile(member)
                content = stream.read() if stream is not None else b""
                if len(content) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                if suffix in members:
                    members = f"has two members {printable(suffix, most=40)!r}"
                    continue
                members[suffix] = content
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(
            f"{file} ({place}) cannot be read as a tar file: {error}. Make it again, or leave it out."
        ) from error
    if key is not None:
        yield key, members


def _record(members: dict[str, bytes], source: SourceConfig) -> dict[str, Any]:
    """What the sample says: the fields of its `.json`; without media there, its media in order and its text."""
    by_kind: dict[str, list[str]] = {}
    for suffix in members:
        by_kind.setdefault(_KINDS[suffix.rpartition(".")[2].lower()], []).append(suffix)
    record: dict[str, Any] = {}
    for suffix in by_kind.get("json", []):
        try:
            found = parse_json(members[suffix])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"has a member {suffix} that is not JSON: {error}") from error
        if isinstance(found, dict):
            record |= found
    if any(record.get(name) is not None for name in (source.parts_field, *FIELDS)):
        return record
    parts: list[Any] = [
        {"type": _KINDS[suffix.rpartition(".")[2].lower()], "bytes": content}
        for suffix, content in members.items()
        if _KINDS[suffix.rpartition(".")[2].lower()] in KINDS
    ]
    texts = [members[suffix] for suffix in by_kind.get("text", [])]
    try:
        parts += [{"type": "text", "text": text.decode("utf-8-sig")} for text in texts]
    except UnicodeDecodeError as error:
        raise ValueError(f"has text that is not UTF-8: {error.reason} at byte {error.start}") from error
    if not texts and isinstance(record.get(source.text_field), str):
        parts.append({"type": "text", "text": record[source.text_field]})
    return {source.parts_field: parts}


def _fetch(key: str, members: dict[str, bytes]) -> Fetch:
    """Finds a member by its suffix, its name or its path."""
    folder, stem = str(PurePosixPath(key).parent), PurePosixPath(key).name

    def fetch(name: str) -> bytes:
        for prefix in ("", f"{stem}.", f"{folder}/{stem}."):
            if name.startswith(prefix) and name.removeprefix(prefix) in members:
                return members[name.removeprefix(prefix)]
        raise ValueError(f"is not a member of this sample (it has: {', '.join(members)})")

    return fetch
