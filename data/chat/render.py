"""Renders one chat template, confined: started by `data.chat.template` as a script of its own, never imported.

    stdin: {"source", "special", ...}, then {"messages", ...} for each chat    --Jinja's sandbox, limits-->
    stdout: {"text", "spans", "written"} or {"error"}

Each message on the pipes is JSON after its length (8 bytes, little-endian). Templates come from strangers. Jinja's sandbox keeps
them from Python's internals, but not from taking all memory or never ending. So this process has almost no environment, can
neither write nor open files, has limited memory, and the kernel ends it when one chat takes too long, also if the parent is
gone.

The environment is that of transformers' `apply_chat_template` (transformers 5.23, `utils/chat_template_utils.py`), so that
the text is the same. What stands between `{% generation %}` and `{% endgeneration %}` is put between two marks, which no chat
can contain because they are drawn for each chat. The chat is rendered without marks too: a template that changes or repeats
marked text writes something else then, and is refused.

Which special tokens does the template write, and which come out of messages? To tell them apart, the chat is rendered once more
with inert text of the same shape in place of all that its authors wrote (`inert`).
"""

import json
import math
import re
import resource
import secrets
import signal
import sys
import time
from typing import Any, BinaryIO

import jinja2.debug  # noqa: F401  Jinja imports it when something is wrong, and no file can be opened then
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20
SECONDS = 10
"""For one chat."""
LARGEST_TEXT = 64 << 20
"""Characters of the longest text that is sent back."""
PRIVATE, PRIVATE_COUNT = 0xE000, 0x1900
"""Unicode's characters for private use: not letters, digits or blanks, in no case, never escaped in JSON."""


class Substitutes(dict[int, int]):
    """For `str.translate`: blanks stay, every other character becomes one for private use, in the same order."""

    def __missing__(self, code: int) -> int:
        self[code] = code if chr(code).isspace() else PRIVATE + code % PRIVATE_COUNT
        return self[code]


SUBSTITUTES = Substitutes()
_OTHER_DIGITS = str.maketrans("0123456789", "1234567891")
"""Every digit becomes another one, and the first is not 0."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Generation(Extension):
    """The tag `{% generation %}`: marks what the assistant wrote."""

    tags = {"generation"}
    start, stop = "", ""
    count = 0
    """Times that the tag was rendered."""

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag's body, handed to `marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> str:
        """The text of the tag's body between the marks."""
        Generation.count += 1
        return f"{Generation.start}{caller()}{Generation.stop}"


def raise_exception(message: str) -> None:
    """What templates call to refuse a chat."""
    raise TemplateError(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """transformers' `tojson`: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compiled(source: str) -> Any:
    """The template of a source. Raises TemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


class Template:
    """A template with what is needed to check its texts. Raises TemplateError."""

    def __init__(self, source: str, special: list[str], roles: list[str], prose: list[str]) -> None:
        """special: names of the tokenizer's special tokens, the longest first. roles: the known ones. prose: fields of a message
        that are never a kind or a name."""
        self.roles, self.prose = roles, prose
        self.jinja = compiled(source)
        self.special = re.compile("|".join(map(re.escape, special)))
        tree = self.jinja.environment.parse(source)
        constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self.keys = constants | {node.attr for node in tree.find_all(nodes.Getattr)} | {"role", "content"}
        """What the template may look up in a message or a tool."""
        self.values = {text for text in constants if not any(text in name or name in text for name in special)}
        """What the template may compare a kind or a name with."""
        numbers = {node.value for node in tree.find_all(nodes.Const) if _is_number(node.value)}
        self.numbers = {number for number in numbers if not any(str(number) in name for name in special)}
        """What it may compare a number with."""

    def inert(self, value: Any, kept: re.Pattern[str], *, is_prose: bool = False) -> Any:
        """Inert text of the same shape for every text in `value`. Kept are the keys that the template looks up, texts that equal
        a constant of the template (not for prose), and `kept` wherever it stands."""
        if isinstance(value, dict):
            return {
                key if key in self.keys else self.inert(key, kept): inner
                if key == "role" and inner in self.roles
                else self.inert(inner, kept, is_prose=is_prose or key in self.prose)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self.inert(inner, kept, is_prose=is_prose) for inner in value]
        if _is_number(value):
            return value if value in self.numbers else type(value)(str(value).translate(_OTHER_DIGITS))
        if not isinstance(value, str) or (value in self.values and not is_prose):
            return value
        pieces = kept.split(value)
        pieces[::2] = [piece.translate(SUBSTITUTES) for piece in pieces[::2]]
        return "".join(pieces)


def rendered(template: Template, chat: dict[str, Any]) -> dict[str, Any]:
    """The answer to one chat, or what is wrong: its text, the spans of marked text in it, and, if "kept" is not null, the special
    tokens that the template writes with inert text in place of all texts except those of "kept"."""
    # With every digit, so that a template that changes one of them changes every mark.
    mark = secrets.token_hex(16) + "0123456789abcdef"
    start, stop = f"<{mark}>", f"</{mark}>"
    date, kept = chat.pop("date"), chat.pop("kept")

    def strftime_now(how: str) -> str:
        if date is None:
            raise_exception("it asks for today's date, so the same data prepared tomorrow would differ")
        return time.strftime(how, time.localtime(date))

    def render(chat: dict[str, Any], start: str = "", stop: str = "") -> str:
        Generation.start, Generation.stop, Generation.count = start, stop, 0
        text: str = template.jinja.render(**chat, strftime_now=strftime_now)
        return text

    what = "does not take these messages"
    try:
        # Not by a pattern: a new one for each chat would take longer to compile than the chat to render.
        parts = [part.split(stop) for part in render(chat, start, stop).split(start)]
        text, count = "".join(piece for part in parts for piece in part), Generation.count
        if count and render(chat) != text:
            raise_exception(
                "it writes something else without {% generation %}: it changes or repeats what is marked, or draws at random"
            )
        if [len(part) for part in parts] != [1] + [2] * count:
            raise_exception("it has {% generation %} inside {% generation %}, or repeats or drops marked text")
        if len(text) > LARGEST_TEXT:
            return {"error": f"the chat template makes a text of {len(text):,} characters"}
        written = None
        if kept is not None:
            what = "cannot be checked for special tokens out of these messages: with inert text in their place"
            words = re.compile(f"({'|'.join(map(re.escape, kept))})")
            inert = [template.inert(message, words) for message in chat["messages"]]
            written = template.special.findall(
                render(chat | {"messages": inert, "tools": template.inert(chat["tools"], words)})
            )
    except MemoryError:
        return {"error": f"the chat template takes more than {MEMORY_BYTES:,} bytes of memory"}
    except Exception as error:  # of any kind: the template may do anything that Jinja's sandbox allows
        return {"error": f"the chat template {what}: {str(error)[:500] or type(error).__name__}"}
    spans, at = [], len(parts[0][0])
    for inside, after in parts[1:]:
        spans.append((at, at + len(inside)))
        at += len(inside) + len(after)
    return {"text": text, "spans": spans, "written": written}


def receive(stream: BinaryIO) -> Any:
    """The next message; None at the end."""
    size = stream.read(8)
    return json.loads(stream.read(int.from_bytes(size, "little"))) if len(size) == 8 else None


def send(stream: BinaryIO, message: Any) -> None:
    """Write one message."""
    content = json.dumps(message).encode()
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def main() -> None:
    """Answer until the parent closes the pipe."""
    # What Python and Jinja load when it is first needed, and could not be opened below.
    source = "{% set n = namespace(a=[1]) %}{{ '\\n' ~ n.a | tojson ~ now('%d %B %Y') }}"
    Template(source, ["a"], [], []).jinja.render(now=time.strftime)
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (most, most))
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    # An alarm that nothing handles ends the process: Python need not get a turn for it.
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        template = Template(**receive(given))
        send(answers, {"error": None})
    except (TemplateError, ValueError, RecursionError, MemoryError) as error:
        send(answers, {"error": str(error)[:500] or type(error).__name__})
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    while (chat := receive(given)) is not None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        answer = rendered(template, chat)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(answers, answer)


if __name__ == "__main__":
    main()
