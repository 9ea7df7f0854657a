"""From the body of a call to its checked fields.

bytes --length--> --UTF-8, JSON--> plain values --schema.py--> CompletionCall | ChatCall      (else ServerRefusal)
"""

import json
from typing import Any

import numpy as np
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recipes.schema.foreign import decoded, parse_json, printable
from train.serve.refusal import ServerRefusal, error_body

_MOST_DROPPED = 32 * 2**20
"""Bytes of a too long body that are read before the connection is closed."""
_MOST_VALUES = 200_000
"""Values of a body's JSON: to read a million of them would stop other clients for a second."""
_REMEDY = 'Send one JSON object in UTF-8, such as {"model": "NAME", "prompt": "TEXT"}.'


class LimitedBodies:
    """Refuses a body that is too long before all of it is in memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body is longer than {self._most:,} bytes."
        refusal = JSONResponse(error_body(413, message), 413, headers={"connection": "close"})
        sizes = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(not size.isdigit() or int(size) > self._most for size in sizes):
            # A client reads the answer only after it has sent its body, so some of it is read and dropped.
            dropped, more = 0, True
            while more and dropped < _MOST_DROPPED:
                part = await receive()
                dropped += len(part.get("body", b""))
                more = part.get("more_body", False)
            await refusal(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > self._most:
                raise ServerRefusal(413, message)
            return part

        await self._app(scope, counted, send)


async def read_call[Call: BaseModel](request: HttpRequest, kind: type[Call]) -> Call:
    """The fields of a call. Raises ServerRefusal; ClientDisconnect if the client has gone."""
    _check_media_type(request.headers.get("content-type", ""))
    fields = _fields(await request.body())
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # Each kind of prompt has an error; the list that is too long is of the right kind.
        first = next((each for each in errors if each["type"] == "too_long"), errors[0])
        loc = [printable(str(part), most=100) for part in first["loc"]]
        message = f"{'.'.join(loc)}: {first['msg']}" if loc else str(first["msg"])
        raise ServerRefusal(400, message, param=loc[0] if loc else None) from error


def _check_media_type(header: str) -> None:
    # A page of another site can post text and forms to this machine without asking, but not JSON.
    kind = header.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        message = f"the body's content-type is {kind[:100]!r}. Send the header content-type: application/json."
        raise ServerRefusal(400, message)


def _fields(content: bytes) -> dict[str, Any]:
    """The object in a body."""
    try:
        text = decoded(content)
    except ValueError as error:
        raise ServerRefusal(400, f"the body is not JSON: {error}. {_REMEDY}") from error
    values = _values_in(content)
    if values > _MOST_VALUES:
        raise ServerRefusal(
            413,
            f"the body has {values:,} JSON values; at most {_MOST_VALUES:,} are read. Send fewer prompts at a time, or texts.",
        )
    try:
        fields = parse_json(text)
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        raise ServerRefusal(400, f"the body is not JSON: {error.msg} at byte {at:,}. {_REMEDY}") from error
    except ValueError as error:
        raise ServerRefusal(400, f"the body cannot be used: {error}. {_REMEDY}") from error
    if not isinstance(fields, dict):
        raise ServerRefusal(400, f"the body is not a JSON object. {_REMEDY}")
    if b"\\ud" in content or b"\\uD" in content:
        for name, value in fields.items():
            _check_surrogates(name, value)
    return fields


def _values_in(content: bytes) -> int:
    """About how many values a JSON text has: its commas, colons and opening brackets, outside of texts."""
    if len(content) <= _MOST_VALUES:
        return 0
    codes = np.frombuffer(content.replace(b"\\\\", b"__").replace(b'\\"', b"__"), np.uint8)
    is_text = np.logical_xor.accumulate(codes == ord('"'))
    return sum(int(np.count_nonzero((codes == code) & ~is_text)) for code in b",:[{")


def _check_surrogates(name: str, value: Any) -> None:
    r"""Refuse text with half of a surrogate pair, such as "\ud800": it is no character, and UTF-8 cannot contain it."""
    try:
        json.dumps([name, value], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        name = printable(name.encode(errors="backslashreplace").decode(), most=100)
        raise ServerRefusal(
            400,
            f"{name}: it contains {half}, half of a surrogate pair, which is not a character. Send both halves, or UTF-8.",
            param=name,
        ) from error
