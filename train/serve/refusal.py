"""Error answers in OpenAI's form, {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi import HTTPException


class ServerRefusal(HTTPException):
    """An error answer in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_s: int = 0
    ) -> None:
        super().__init__(status, message, headers={"Retry-After": str(retry_s)} if retry_s else None)
        self.body = error_body(status, message, param=param, code=code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error answer, as JSON."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
