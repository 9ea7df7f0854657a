"""`hf import OWNER/NAME` and `hf export --push OWNER/NAME` against a small server that answers what huggingface_hub asks."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from hf_models import GEMMA, exported, recipe_of, scrambled, trained
from hub_server import HubHandler

pytestmark = pytest.mark.slow  # commands run in separate processes, which read HF_ENDPOINT when they start
ROOT = Path(__file__).resolve().parents[3]
SHA = "a" * 40


class Hub(HubHandler):
    """Models in `folder`/OWNER/NAME, of one revision each; commits write there."""

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            model = self.folder / parts[2] / parts[3]
            if not model.is_dir():
                self.answer(b"", 404, X_Error_Code="RepoNotFound")
            elif "tree" in parts:
                self.answer_json([
                    {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "1" * 40} for one in model.iterdir()
                ])  # fmt: skip
            else:
                siblings = [{"rfilename": one.name} for one in sorted(model.iterdir())]
                self.answer_json({"id": "/".join(parts[2:4]), "sha": SHA, "siblings": siblings, "private": False})
        elif len(parts) == 5 and (file := self.folder / parts[0] / parts[1] / parts[4]).is_file():
            self.answer(file.read_bytes(), ETag=f'"{file.name}"', X_Repo_Commit=SHA)
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b"".join(iter(self._chunk, b""))
        path = urlparse(self.path).path
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.answer_json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.answer_json({
                "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            })  # fmt: skip
        elif "/commit/" in path:
            model = self.folder / "/".join(path.split("/")[3:5])
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                if entry["key"] == "file":
                    (model / entry["value"]["path"]).write_bytes(base64.b64decode(entry["value"]["content"]))
            address = f"http://{self.headers['Host']}/{model.parent.name}/{model.name}/commit/{SHA}"
            self.answer_json({"commitUrl": address, "commitOid": SHA, "success": True})
        else:
            self.answer_json({"errors": [], "warnings": []})  # the card's head is fine

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().strip() or b"0", 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A hub with one model, me/small, and the environment that finds it."""
    root = tmp_path_factory.mktemp("hub")
    path = scrambled(trained(root / "run", recipe_of(GEMMA), world=1), root / "scrambled")
    exported(path, root / "models" / "me" / "small", GEMMA)
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=root / "models"))
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{made.server_port}", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
           "HF_HOME": str(root / "home"), "HF_TOKEN": "hf_test", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    yield root, os.environ | hub
    made.shutdown()
    made.server_close()


def command(environment: dict[str, str], folder: Path, *words: object) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "train.hf", *map(str, words)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def test_a_model_comes_from_the_hub_and_goes_back(server: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root, environment = server
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    status, output = command(offline, tmp_path, "import", "me/small", "--out", "ours", "--no-check")
    assert status == 2 and "HF_HUB_OFFLINE=1 forbids fetching it" in output, output
    status, output = command(environment, tmp_path, "import", "me/small", "--out", "ours", "--no-check")
    assert status == 0, output
    assert "imported_from" in (tmp_path / "ours" / "checkpoint" / "manifest.json").read_text()
    words = ["export", "ours", "--out", "back", "--no-check", "--push", "me/again", "--license", "apache-2.0"]
    status, output = command(environment, tmp_path, *words)
    assert status == 0 and "pushed to http://127.0.0.1" in output, output
    pushed = root / "models" / "me" / "again"
    assert {path.name for path in pushed.iterdir()} == {path.name for path in (tmp_path / "back").iterdir()}
    assert all((pushed / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "back").iterdir())
    assert "license: apache-2.0" in (pushed / "README.md").read_text()


def test_names_that_are_neither_directory_nor_model_are_refused(
    server: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    _, environment = server
    status, output = command(environment, tmp_path, "import", "nowhere", "--out", "x")
    assert status == 2 and "nowhere is neither a directory nor the name of a model on the hub" in output, output
    status, output = command(environment, tmp_path, "import", "me/nothing", "--out", "x")
    assert status == 2 and "me/nothing cannot be fetched from http://127.0.0.1" in output, output
