"""Renders one chat template, confined: started by `data.chat.template` as a script of its own, never imported.

    stdin: {"template"}, then {"messages", ...} for each chat    --Jinja's sandbox, limits-->    stdout: {"text"} or {"error"}

Each message on the pipes is JSON after its length (8 bytes, little-endian). Templates come from strangers. Jinja's sandbox keeps
them from Python's internals, but not from taking all memory or never ending. So this process has almost no environment, can
neither write nor open files, has limited memory, and the kernel ends it when one chat takes too long, also if the parent is
gone.

The environment is that of transformers' `apply_chat_template` (transformers 5.23, `utils/chat_template_utils.py`), so that
the text is the same. What stands between `{% generation %}` and `{% endgeneration %}` is put between two marks, which no chat
can contain because they are drawn for each chat.
"""

import json
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


class Generation(Extension):
    """The tag `{% generation %}`: marks what the assistant wrote."""

    tags = {"generation"}
    start, stop = "", ""

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag's body, handed to `marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> str:
        """The text of the tag's body between the marks."""
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


def rendered(template: Any, chat: dict[str, Any]) -> dict[str, Any]:
    """The answer to one chat: its text and the marks in it, or what is wrong."""
    mark = secrets.token_hex(16)
    Generation.start, Generation.stop = f"<{mark}>", f"</{mark}>"
    date = chat.pop("date")

    def strftime_now(how: str) -> str:
        if date is None:
            raise_exception("it asks for today's date, so the same data prepared tomorrow would differ")
        return time.strftime(how, time.localtime(date))

    try:
        text = template.render(**chat, strftime_now=strftime_now)
    except MemoryError:
        return {"error": f"the chat template takes more than {MEMORY_BYTES:,} bytes of memory"}
    except Exception as error:  # of any kind: the template may do anything that Jinja's sandbox allows
        return {"error": f"the chat template does not take these messages: {str(error)[:500] or type(error).__name__}"}
    if len(text) > LARGEST_TEXT:
        return {"error": f"the chat template makes a text of {len(text):,} characters"}
    return {"text": text, "start": Generation.start, "stop": Generation.stop}


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
    compiled("{% set n = namespace(a=[1]) %}{{ '\\n' ~ n.a | tojson ~ now('%d %B %Y') }}").render(now=time.strftime)
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
        template = compiled(receive(given)["template"])
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
