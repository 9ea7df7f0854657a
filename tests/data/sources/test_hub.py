"""Prepared data and sources behind hf://, from a small server that answers what huggingface_hub asks of the Hub."""

import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlparse

from hub_server import HubHandler
from shards import random_documents, write_folder

ROOT = Path(__file__).resolve().parents[3]
REPO = "/api/datasets/me/set"
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from rich.console import Console
from recipes.schema.data import CacheConfig, DataConfig, SourceConfig, TokenizerConfig
from data.dataset import open_dataset
from recipes.schema.errors import DataError
from data.prepare import prepare


def main(home):
    for number, path in enumerate(("texts", "texts/*.jsonl", "texts/part-{0..1}.jsonl")):
        manifest = prepare(
            DataConfig(folder=str(home / f"prepared-{number}"), sources={"s": SourceConfig(path=f"hf://datasets/me/set/{path}")},
                       tokenizer=TokenizerConfig(vocab_size=300), row_tokens=16, workers=1 + (number == 0), shard_bytes=3000),
            console=Console(quiet=True),
        )
        documents = sum(manifest.sources["s"].count(split, "documents") for split in ("train", "heldout"))
        assert documents == 200, (path, documents)
    rest = {"sources": {"a": SourceConfig(path="-")}, "row_tokens": 16, "shuffle_shards": 1,
            "cache": CacheConfig(folder=str(home / "cache"), retries=0)}
    near = open_dataset(DataConfig(folder=str(home / "repo" / "set"), **rest))
    far = open_dataset(DataConfig(folder="hf://datasets/me/set/set", **rest))
    for start in range(0, 200, 8):
        positions = np.arange(start, start + 8)
        assert (far.training_rows(positions).labels == near.training_rows(positions).labels).all()
    try:
        open_dataset(DataConfig(folder="hf://datasets/me/set/nowhere", **rest))
    except DataError as error:
        assert "hf://datasets/me/set/nowhere/manifest.json does not exist" in str(error), error
    else:
        raise AssertionError("it is not there")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
"""


class Hub(HubHandler):
    """One data set, `me/set`, of one revision: its description, its list of files, and the files, also in parts."""

    def entry(self, path: Path) -> dict[str, object]:
        name = str(path.relative_to(self.folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": "1" * 40}

    def do_GET(self) -> None:
        url = urlparse(self.path)
        path = unquote(url.path)
        if path in (REPO, f"{REPO}/revision/main"):
            self.answer_json({"id": "me/set", "sha": "a" * 40, "siblings": [], "private": False})
        elif path.startswith(f"{REPO}/tree/main"):
            folder = self.folder / path.removeprefix(f"{REPO}/tree/main").strip("/")
            if folder.is_dir():
                found = folder.rglob("*") if "recursive=true" in url.query.lower() else folder.iterdir()
                self.answer_json([self.entry(one) for one in sorted(found)])
            else:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
        elif (file := self.folder / path.removeprefix("/datasets/me/set/resolve/main/")).is_file():
            self.answer_file(file.read_bytes())
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def answer_file(self, content: bytes) -> None:
        headers = {"ETag": '"1"', "X_Repo_Commit": "a" * 40, "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self.answer(content, **headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        self.answer(content[start:stop], 206, Content_Range=f"bytes {start}-{stop - 1}/{len(content)}", **headers)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path.startswith(f"{REPO}/paths-info/main")
        self.answer_json([self.entry(self.folder / name) for name in body["paths"] if (self.folder / name).exists()])


def test_data_on_the_hub_is_read_and_prepared(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "texts").mkdir(parents=True)
    for part in range(2):
        lines = [json.dumps({"text": f"document {n} of part {part}, some words long"}) + "\n" for n in range(100)]
        (repo / "texts" / f"part-{part}.jsonl").write_text("".join(lines))
    documents = random_documents(240, seed=1)
    write_folder(repo / "set", {"a": [documents[i * 40 : i * 40 + 40] for i in range(6)]})
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=repo))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | hub | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    try:
        result = subprocess.run(
            [sys.executable, str(program), str(tmp_path)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
