"""A stand-in for W&B's server, which keeps what a client sends: enough of its GraphQL and of its file stream for runs that are
started, continued and synchronised.

    server.runs[id].history: the rows, in the order in which they arrived
"""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ServedRun:
    """A run as the server knows it."""

    config: str = "{}"
    summary: str = "{}"
    history: list[dict[str, Any]] = field(default_factory=list)


class WandbServer(ThreadingHTTPServer):
    """Listens on a free port of this machine, in a thread; a context."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, ServedRun] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL query."""
        name = variables.get("name") or variables.get("run") or ""
        if "upsertBucket" in query:
            is_new = name not in self.runs
            run = self.runs.setdefault(name, ServedRun())
            run.config = variables.get("config") or run.config
            run.summary = variables.get("summaryMetrics") or run.summary
            return {"upsertBucket": {"bucket": self._bucket(name), "inserted": is_new}}
        if "RunResumeStatus" in query:
            bucket = self._bucket(name) if name in self.runs else None
            project = {"id": "p", "name": "stratum"}
            return {"model": {**project, "entity": {"id": "e", "name": "me"}, "bucket": bucket}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": []}}
        if "serverInfo" in query or "ServerInfo" in query:
            return {
                "serverInfo": {
                    "features": [],
                    "cliVersionInfo": {"max_cli_version": "99"},
                    "latestLocalVersionInfo": None,
                }
            }
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        newest = [json.dumps(row) for row in run.history[-1:]]
        return {
            "id": name, "name": name, "displayName": name, "description": "", "notes": "", "sweepName": None, "tags": [],
            "config": run.config, "summaryMetrics": run.summary, "eventsTail": "[]", "historyTail": json.dumps(newest),
            "historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0, "wandbConfig": '{"t": 1}',
            "project": {"id": "p", "name": "stratum", "entity": {"id": "e", "name": "me"}},
            "historyKeys": None,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/graphql"):
            body = json.loads(content)
            self.server.asked.append(body["query"])
            return self._reply({"data": self.server.answer(body["query"], body.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            body = json.loads(content)
            run = self.server.runs[self.path.split("/")[-2]]
            files = body.get("files") or {}
            if "wandb-summary.json" in files:
                run.summary = files["wandb-summary.json"]["content"][-1]
            sent = files.get("wandb-history.jsonl")
            if sent is not None:  # lines from an offset on replace what is there
                run.history[sent["offset"] :] = [json.loads(text) for text in sent["content"]]
        return self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def _reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
