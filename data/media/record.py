"""From one record of a data set to its checked parts, as text: one line of JSON, with the bytes of the media in it.

    {"content": [{"type": "text", "text": ...}, {"type": "image", "path": ...}, ...]}     OpenAI's and Hugging Face's parts
    {"text": "a <image> or <image>", "images": [..., ...]}                                each placeholder takes the next medium
    {"text": "a caption", "image": ...}                                                   the medium, then the text
    {"texts": ["before", null, "after"], "images": [null, ..., null]}                     OBELICS: one of both at each place

    record --media_of--> '{"parts": [{"type": "text", "text": "..."}, {"type": "image", "data": "BASE64"}]}'

A medium is a path, bytes (in JSON: base64, or a data URL), or a mapping with one of them. As text with the bytes in it, a record
passes through the same reading, sizes and held-out split as any document: the split follows from the content, not from names. A
record that is wrong is a ValueError that says which part is wrong. Nothing is decoded here, and no URL is opened.
"""

import base64
import binascii
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from recipes.schema.data import SourceConfig
from recipes.schema.foreign import printable, read_bounded

KINDS = ("image", "audio", "video")
Fetch = Callable[[str], bytes]
"""The content of a file that a record names. It raises ValueError with the reason."""

_LISTS = {"image": "images", "audio": "audios", "video": "videos"}
FIELDS = ("texts", *KINDS, *_LISTS.values())
"""Fields of the forms without parts, besides `text_field`."""
_TYPES = {
    "text": "text", "input_text": "text", "image": "image", "image_url": "image", "input_image": "image", "audio": "audio",
    "input_audio": "audio", "audio_url": "audio", "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_PLACEHOLDER = re.compile("<(image|audio|video)>")
_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+=-]+)*,", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def media_of(source: SourceConfig, *, fetch: Fetch | None) -> Callable[[Any], str]:
    """A function from a record to its parts as a line of JSON. It raises ValueError with the reason.

    fetch: reads a file that a record names by a relative path; None if paths cannot be used here.
    """
    return lambda record: json.dumps({"parts": list(_parts(record, source, fetch))}, ensure_ascii=False)


def media_words_of(text: str) -> str:
    """The text of a record, without its media, for training a tokenizer. text: as `media_of` gives it."""
    return "\n".join(part["text"] for part in json.loads(text)["parts"] if part["type"] == "text")


def folder_fetch(folder: Path, *, most_bytes: int) -> Fetch:
    """Reads files below a folder, by relative paths. Links that lead out of it are refused too."""
    root = Path(os.path.realpath(folder))

    def fetch(name: str) -> bytes:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError("leads out of the folder of its file")
        found = Path(os.path.realpath(root / path))
        if not found.is_relative_to(root):
            raise ValueError("is a link that leads out of the folder of its file")
        try:
            return read_bounded(found, most_bytes=most_bytes)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror or error}") from error

    return fetch


def _parts(record: Any, source: SourceConfig, fetch: Fetch | None) -> Iterator[dict[str, str]]:
    if not isinstance(record, Mapping):
        raise ValueError(f"is a {type(record).__name__}, not a record with {source.parts_field!r}")
    lists = {kind: _list_of(record, kind) for kind in KINDS}
    content = record.get(source.parts_field)
    used = dict.fromkeys(KINDS, 0)
    if isinstance(content, list):
        parts = _from_content(content)
    elif isinstance(record.get("texts"), list):
        parts = _from_texts(record, record["texts"])
        lists = {kind: [] for kind in KINDS}  # its lists stand at places, not for placeholders
    else:
        text = content if isinstance(content, str) else record.get(source.text_field)
        parts = _from_text(record, text, source)
    empty = True
    for number, (kind, value) in enumerate(parts, start=1):
        empty = False
        if kind == "text":
            yield {"type": "text", "text": value}
            continue
        if value is None:  # the next one of the record's list
            value = lists[kind][used[kind]] if used[kind] < len(lists[kind]) else None
            used[kind] += 1
            if value is None:
                continue  # counted below
        try:
            data = _bytes_of(value, kind, fetch)
        except ValueError as error:
            raise ValueError(f"part {number} ({kind}) {error}") from error
        if not data:
            raise ValueError(f"part {number} ({kind}) has 0 bytes")
        yield {"type": kind, "data": base64.b64encode(data).decode()}
    for kind, count in used.items():
        if count != len(lists[kind]):
            raise ValueError(
                f"has {count} placeholder{'s' * (count != 1)} for {_LISTS[kind]}, but {len(lists[kind])} under {_LISTS[kind]!r}: "
                f"write one <{kind}> in the text, or one part without a value, for each"
            )
    if empty:
        names = printable(", ".join(map(str, record)), most=200)
        raise ValueError(f"has no parts (it has: {names}). Set parts_field or text_field of this source")


def _list_of(record: Mapping[str, Any], kind: str) -> list[Any]:
    """The media that placeholders of a kind stand for."""
    some = record.get(_LISTS[kind])
    if some is None:
        return []
    if not isinstance(some, list):
        raise ValueError(f"has {type(some).__name__} under {_LISTS[kind]!r}, not a list")
    return some


def _from_content(content: list[Any]) -> Iterator[tuple[str, Any]]:
    for number, part in enumerate(content, start=1):
        if isinstance(part, str):
            yield "text", part
            continue
        type_ = part.get("type") if isinstance(part, Mapping) else None
        kind = _TYPES.get(type_) if isinstance(type_, str) else None
        if kind is None:
            what = f"of type {type_!r}" if isinstance(part, Mapping) else f"a {type(part).__name__}"
            raise ValueError(f"part {number} is {printable(what, most=80)}; known types are {', '.join(_TYPES)}")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"part {number} is of type text, but its text is not a string")
            yield "text", part["text"]
            continue
        # The value stands under the type's name, or in the part itself.
        names = [name for name in (str(type_), kind, f"{kind}_url") if part.get(name) is not None]
        inner = {name: value for name, value in part.items() if name != "type" and value is not None}
        yield kind, part[names[0]] if names else inner if inner.keys() & set(_VALUES) else None


def _from_texts(record: Mapping[str, Any], texts: list[Any]) -> Iterator[tuple[str, Any]]:
    columns = {"text": texts} | {
        kind: record[_LISTS[kind]] for kind in KINDS if isinstance(record.get(_LISTS[kind]), list)
    }
    sizes = {len(column) for column in columns.values()}
    if len(sizes) != 1:
        counts = ", ".join(f"{len(column)} {kind}s" for kind, column in columns.items())
        raise ValueError(
            f"has lists of different lengths ({counts}): texts and media stand at the same places, else null"
        )
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        here = [(kind, value) for kind, value in zip(columns, values, strict=True) if value is not None]
        if len(here) != 1:
            raise ValueError(f"place {number} of its lists has {len(here)} values, not one")
        if here[0][0] == "text" and not isinstance(here[0][1], str):
            raise ValueError(f"place {number} of texts has {type(here[0][1]).__name__}, not text")
        yield here[0]


def _from_text(record: Mapping[str, Any], text: Any, source: SourceConfig) -> Iterator[tuple[str, Any]]:
    single = {kind: record[kind] for kind in KINDS if record.get(kind) is not None}
    if text is None and not single:
        return
    if text is not None and not isinstance(text, str):
        raise ValueError(f"has {type(text).__name__} under {source.text_field!r}, not text")
    text = text or ""
    has_media = bool(single) or any(record.get(name) is not None for name in _LISTS.values())
    pieces: list[str] = _PLACEHOLDER.split(text) if has_media else [text]
    marked = set(pieces[1::2])
    for kind, value in single.items():
        if kind not in marked:
            yield kind, value
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            if piece:
                yield "text", piece
        elif piece in single:
            if pieces[1::2].count(piece) != 1:
                raise ValueError(f"has {pieces[1::2].count(piece)} placeholders <{piece}>, but one {piece}")
            yield piece, single[piece]
        else:
            yield piece, None


_VALUES = ("bytes", "data", "base64", "path", "url", "file", "array", "file_id", "file_uri")
"""Fields of a mapping that may hold a medium; the last four to say why they cannot."""


def _bytes_of(value: Any, kind: str, fetch: Fetch | None) -> bytes:
    """The stored bytes of a medium."""
    if isinstance(value, Mapping):
        for name in ("bytes", "data", "base64"):
            inner = value.get(name)
            if isinstance(inner, bytes):
                return inner
            if isinstance(inner, str):
                return _data_url(inner) if inner.startswith("data:") else _from_base64(inner)
        for name in ("path", "url", "file"):
            if isinstance(value.get(name), str):
                return _bytes_of(value[name], kind, fetch)
        names = ", ".join(map(str, value)) or "nothing"
        raise ValueError(
            f"has {printable(names, most=80)}, but no path, bytes, base64 or data URL. Store {kind} files, not decoded values"
        )
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"is a {type(value).__name__}, not a path or bytes")
    if value.startswith("data:"):
        return _data_url(value)
    shown = printable(value, most=120)
    if _SCHEME.match(value):
        raise ValueError(f"is the URL {shown}: nothing is downloaded. Fetch it before preparing, and name its path")
    if fetch is None:
        raise ValueError(
            f"names the file {shown}, and paths can be read of local files only. Put the bytes into the record"
        )
    try:
        return fetch(value)
    except ValueError as error:
        raise ValueError(f"{shown} {error}") from error


def _data_url(value: str) -> bytes:
    head = _DATA_URL.match(value[:200])
    if head is None or ";base64" not in head[0]:
        raise ValueError("is a data URL without base64")
    return _from_base64(value[head.end() :])


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"is not base64: {error}") from error
