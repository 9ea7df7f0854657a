"""Shared code of test servers of the Hugging Face hub: serves files of a folder, with their lengths."""

import http.server
import json
from pathlib import Path
from typing import Any


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers requests about what is in `folder`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, folder: Path) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")
