"""Reads small files that someone else wrote, with limits, and shows their texts without control characters.

    path --read_bounded--> bytes of a regular file, up to a limit          (no pipe, device or endless file blocks a reader)
    text --parse_yaml--> plain values, as JSON could contain them          (no tags, no duplicate keys, no alias bombs)
    text --printable--> the same text for a terminal or a log              (no escape codes, no line breaks)

Every reader of a run's, a checkpoint's or a model's small files uses these functions. They raise ValueError or OSError, and the
caller turns it into its own error with the file's name.
"""

import errno
import json
import os
import re
import stat
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import yaml

LARGEST_TEXT = 16 << 20
"""Size limit in bytes of a recipe, pointer or small JSON file."""
_MOST_YAML_NODES = 200_000
_DEEPEST = 100
"""Limit for nested mappings and lists."""


class NotAFile(OSError):
    """A pipe, a device, a folder or a too large file was found instead of a small file."""


class _Loader(yaml.SafeLoader):
    """Accepts only YAML's plain values, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ValueError(f"the key {printable(key.value)!r} is written twice ({_place(key)})")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError; for a folder, a pipe or a device it is NotAFile."""
    # Without O_NONBLOCK, opening a pipe without a writer would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):  # before fdopen, which refuses a folder by the descriptor's number
        os.close(descriptor)
        raise NotAFile(errno.EINVAL, f"it is {_kind(mode)}, not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, *, most_bytes: int = LARGEST_TEXT) -> bytes:
    """The content of a regular file of at most `most_bytes`. Raises OSError; for anything else it is NotAFile."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(most_bytes + 1) if size <= most_bytes else b""
    if max(len(content), size) > most_bytes:
        raise NotAFile(errno.EFBIG, f"it is longer than {most_bytes:,} bytes", str(path))
    return content


def read_bounded_text(path: Path, *, most_bytes: int = LARGEST_TEXT) -> str:
    """The text of a regular file. Raises OSError as `read_bounded`, ValueError if it is not UTF-8."""
    return decoded(read_bounded(path, most_bytes=most_bytes))


def decoded(content: bytes) -> str:
    """UTF-8 bytes as text, without the byte order mark that Windows editors write. ValueError names the first byte that is not
    UTF-8."""
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start:,} is 0x{content[error.start]:02x})") from error


def parse_json(content: str | bytes) -> Any:
    """json.loads that raises ValueError for every failure, also for a key that is written twice."""
    try:
        return json.loads(decoded(content) if isinstance(content, bytes) else content, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its keys and values. ValueError if a key is written twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {printable(twice, most=100)!r} is written twice")
    return value


def read_json(path: Path, *, most_bytes: int = LARGEST_TEXT) -> Any:
    """The value of a JSON file. Raises OSError as `read_bounded`, ValueError if it is not JSON."""
    return parse_json(read_bounded(path, most_bytes=most_bytes))


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    ValueError, with line and column, if it is not YAML, has tags, is nested too deeply, is too large when its aliases are
    written out, or has a key twice.
    """
    try:
        _check_nesting(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_expansion(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        reason = " ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
        hint = ". YAML is indented with blanks, not tabs" if "'\\t'" in reason else ""
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise ValueError(f"it is not YAML that can be read: {printable(reason)}{where}{hint}") from error
    except (yaml.YAMLError, RecursionError, TypeError, OverflowError) as error:
        raise ValueError(f"it is not YAML that can be read: {printable(str(error))}") from error


def printable(text: str, *, most: int | None = None) -> str:
    """At most `most` characters of a text, with control characters (escape codes, line breaks, text direction) as escapes."""
    cut = text if most is None or len(text) <= most else text[:most] + "..."
    if cut.isprintable():
        return cut
    return "".join(_escaped(c) if _is_control(c) else c for c in cut)


def printable_lines(text: str) -> str:
    """As `printable`, for a text of several lines: line breaks and tabs are kept."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.replace("\r\n", "\n").split("\n"))


def literal(value: Any) -> Any:
    """Plain values for a recipe file: `${...}` in texts is escaped, so that OmegaConf reads it as text, not as a reference."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [literal(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value)


def without_literals(value: Any) -> Any:
    """The inverse of `literal`."""
    if isinstance(value, dict):
        return {key: without_literals(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_literals(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"((?:\\\\)*)\\\$\{", lambda found: f"{found[1][: len(found[1]) // 2]}${{", value)


def in_markdown(text: str, *, most: int = 300) -> str:
    """A text for one cell or line of Markdown. Markup, HTML and line breaks in it have no effect."""
    # An underscore between letters or digits is not markup. Many names contain one, so it is kept.
    return re.sub(
        r"((?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|[\\`*{}\[\]()#+!|~&<>$])",
        lambda found: f"&#{ord(found[1])};",
        printable(text, most=most),
    )


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((kind for matches, kind in kinds if matches(mode)), "a device")


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"


def _check_nesting(text: str) -> None:
    """ValueError if the YAML is too deep or too large. Uses parser events, so that nothing is built yet."""
    depth = 0
    for nodes, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if nodes > _MOST_YAML_NODES:
            raise ValueError(f"it has more than {_MOST_YAML_NODES:,} values")


def _check_expansion(root: yaml.Node) -> None:
    """ValueError if the YAML is too large when its aliases are written out. Nine lines of aliases can be a billion values."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ValueError(f"an alias contains itself ({_place(node)})")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
            sizes[id(node)] = 1 + sum(map(size, parts))
            open_nodes.remove(id(node))
        return sizes[id(node)]

    if size(root) > _MOST_YAML_NODES:
        raise ValueError(f"its aliases stand for more than {_MOST_YAML_NODES:,} values")
