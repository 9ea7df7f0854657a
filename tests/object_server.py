"""A small server that speaks the parts of S3 that this project uses, with faults. Also Google's XML interface, which is alike.

    with object_server(fault) as server: os.environ |= server.environment      objects: server.objects

fault(request) is called before each request is carried out and says what to do with it: "" (answer), "500", "cut" (close the
connection), "lost" (carry it out, then close), "slow" (1 s late). Conditions, multipart uploads and ranges work as documented by
Amazon and Google; signatures are not checked. `tests/train/checkpoint/test_storage_servers.py` runs the same on moto.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

SECRET = "0secret0key0of0a0test0"


@dataclass(frozen=True)
class Request:
    """One request that has arrived."""

    number: int
    method: str
    key: str
    """Name of the object below its bucket; empty for a listing."""
    query: dict[str, str]

    @property
    def is_part(self) -> bool:
        return "partNumber" in self.query


Fault = Callable[[Request], str]


@dataclass
class ObjectServer:
    """Objects of all buckets by `bucket/key`, and requests so far."""

    port: int = 0
    fault: Fault = lambda request: ""
    objects: dict[str, bytes] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.port}"
        google = {
            "gcs_base_url": address,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        return {
            "AWS_ENDPOINT_URL": address, "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET,
            "STORAGE_EMULATOR_HOST": address, "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(google),
        }  # fmt: skip

    def names(self, contains: str = "") -> list[str]:
        with self.lock:
            return sorted(name.partition("/")[2] for name in self.objects if contains in name)


@contextmanager
def object_server(fault: Fault = lambda request: "") -> Iterator[ObjectServer]:
    server = ObjectServer(fault=fault)

    class Handler(_Handler):
        state = server

    with _Server(("127.0.0.1", 0), Handler) as http:
        server.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed, or has given up, is no news."""


def _xml(tag: str, **fields: str) -> bytes:
    inside = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())
    return f"<{tag}>{inside}</{tag}>".encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: ObjectServer

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _serve(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        name = unquote(address.path.lstrip("/"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.state
        with server.lock:
            request = Request(len(server.requests), self.command, name.partition("/")[2], query)
            server.requests.append(request)
        what = server.fault(request)
        if what == "slow":
            time.sleep(1.0)
        if what == "500":
            return self._answer(500, b"<Error><Code>InternalError</Code><Message>try again</Message></Error>")
        if what == "403":
            return self._answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        if what == "cut":
            self.close_connection = True
            return None
        with server.lock:
            status, content, headers = self._carry_out(name, query, body)
        if what == "lost":
            self.close_connection = True
            return None
        return self._answer(status, content, headers)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _carry_out(self, name: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        server, objects = self.state, self.state.objects
        bucket, _, key = name.partition("/")
        if bucket == "absent":
            return 404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>", {}
        match self.command:
            case "GET" if not key:
                return 200, self._listing(bucket, query.get("prefix", "")), {}
            case "GET" | "HEAD":
                if name not in objects:
                    return 404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>", {}
                content, headers = objects[name], self._facts(name)
                if wanted := self.headers.get("Range"):
                    first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
                    last = min(last, len(content) - 1)
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                    return 206, content[first : last + 1], headers
                return 200, content, headers
            case "POST" if "uploads" in query:
                upload = f"upload-{len(server.uploads)}"
                server.uploads[upload] = {}
                return 200, _xml("InitiateMultipartUploadResult", UploadId=upload), {}
            case "PUT" if "partNumber" in query:
                server.uploads[query["uploadId"]][int(query["partNumber"])] = body
                return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
            case "POST" if "uploadId" in query:
                parts = server.uploads.pop(query["uploadId"], None)
                if parts is None:
                    return 404, b"<Error><Code>NoSuchUpload</Code><Message>no such upload</Message></Error>", {}
                self._store(name, b"".join(parts[n] for n in sorted(parts)))
                return 200, _xml("CompleteMultipartUploadResult", ETag=self._facts(name)["ETag"]), {}
            case "POST" if "delete" in query:
                keys = [part.split("</Key>")[0] for part in body.decode().split("<Key>")[1:]]
                for key in keys:
                    objects.pop(f"{bucket}/{unescape(key)}", None)
                deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
                return 200, f"<DeleteResult>{deleted}</DeleteResult>".encode(), {}
            case "PUT":
                if not self._condition_holds(name):
                    return 412, b"<Error><Code>PreconditionFailed</Code><Message>condition</Message></Error>", {}
                self._store(name, body)
                return 200, b"", self._facts(name)
            case "DELETE":
                server.uploads.pop(query.get("uploadId", ""), None)
                if "uploadId" not in query:
                    objects.pop(name, None)
                return 204, b"", {}
        return 501, b"", {}

    def _store(self, name: str, content: bytes) -> None:
        self.state.objects[name] = content
        self.state.generations[name] = self.state.generations.get(name, 0) + 1

    def _condition_holds(self, name: str) -> bool:
        """If-None-Match: * and If-Match: TAG of S3; x-goog-if-generation-match of Google, in which 0 means "is absent"."""
        here, headers = name in self.state.objects, self.headers
        if headers.get("If-None-Match") == "*" and here:
            return False
        if (tag := headers.get("If-Match")) and not (here and tag == self._facts(name)["ETag"]):
            return False
        if generation := headers.get("x-goog-if-generation-match"):
            return int(generation) == (self.state.generations[name] if here else 0)
        return True

    def _facts(self, name: str) -> dict[str, str]:
        content = self.state.objects[name]
        return {
            "ETag": f'"{hashlib.md5(content).hexdigest()}"', "Last-Modified": formatdate(usegmt=True),
            "x-goog-generation": str(self.state.generations[name]),
        }  # fmt: skip

    def _listing(self, bucket: str, prefix: str) -> bytes:
        entries = "".join(
            f"<Contents><Key>{escape(name.partition('/')[2])}</Key><Size>{len(content)}</Size><ETag>x</ETag>"
            f"<LastModified>2026-11-30T12:00:00.000Z</LastModified></Contents>"
            for name, content in sorted(self.state.objects.items())
            if name.startswith(f"{bucket}/{prefix}")
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
