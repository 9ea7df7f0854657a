"""Prepared data and sources behind s3:// and gs://, from moto and gcp-storage-emulator, through s3fs and gcsfs.

`make test-oracle`. tests/data/sources/install_clouds.sh installs both in folders of their own, which stand first on the path of
these tests' processes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CLOUDS = ROOT / ".clouds"
pytestmark = pytest.mark.oracle

PROGRAM = """
import os, sys, time
from pathlib import Path
import fsspec, numpy as np
from rich.console import Console
from shards import random_documents, write_folder
from data.store.cache import Activity, RemoteFolder
from recipes.schema.data import CacheConfig, DataConfig, SourceConfig, TokenizerConfig
from data.dataset import open_dataset
from recipes.schema.errors import DataError
from data.store.manifest import read_manifest
from data.prepare import prepare
from data.stream import Stream

home, act, scheme = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
cache = CacheConfig(folder=str(home / "cache"), retries=1)
config = DataConfig(
    folder=f"{scheme}://bucket/set", sources={"a": SourceConfig(path="-")}, row_tokens=16, shuffle_shards=1, cache=cache
)
if act == "upload":
    system = fsspec.filesystem(scheme)
    system.mkdir("bucket")
    documents = random_documents(240, seed=1)
    write_folder(home / "set", {"a": [documents[i * 40 : i * 40 + 40] for i in range(6)]})
    for path in (home / "set").iterdir():
        system.pipe(f"bucket/set/{path.name}", path.read_bytes())
    system.pipe("bucket/large.bin", os.urandom(64 << 20))
    for part in range(3):
        lines = "".join('{"text": "document %d of part %d, some words long"}\\n' % (n, part) for n in range(200))
        system.pipe(f"bucket/texts/part-{part}.jsonl", lines.encode())
elif act == "read":
    near = open_dataset(DataConfig(folder=str(home / "set"), sources=config.sources, row_tokens=16, shuffle_shards=1))
    with Stream(open_dataset(config), position=0, global_rows=8, microbatch_rows=8, rank=0, ranks=1,
                prefetch_steps=2) as stream:
        for step in range(40):
            (batch,) = next(stream)
            assert (batch.labels == near.training_rows(np.arange(step * 8, step * 8 + 8)).labels).all()
    fsspec.filesystem(scheme).rm("bucket/set/a.train-00002.bin")
    remote = RemoteFolder(f"{scheme}://bucket/set", CacheConfig(folder=str(home / "other")), Activity())
    try:
        remote.local("a.train-00002.bin", read_manifest(home / "set").sources["a"].splits["train"][2].files["bin"])
    except DataError as error:
        assert f"{scheme}://bucket/set/a.train-00002.bin does not exist" in str(error), error
    else:
        raise AssertionError("it is gone")
elif act == "prepare":
    manifest = prepare(
        DataConfig(folder=str(home / "prepared"), sources={"s": SourceConfig(path=f"{scheme}://bucket/texts/*.jsonl")},
                   tokenizer=TokenizerConfig(vocab_size=300), row_tokens=16, workers=2, shard_bytes=5000),
        console=Console(quiet=True),
    )
    documents = sum(manifest.sources["s"].count(split, "documents") for split in ("train", "heldout"))
    assert documents == 600 and len(manifest.sources["s"].splits["train"]) > 3, documents
elif act == "fetch":
    from data.store.manifest import FileFacts
    RemoteFolder(f"{scheme}://bucket", cache, Activity()).local("large.bin", FileFacts(bytes=64 << 20, sha256="0" * 64))
"""


GS_SERVER = """
from functools import partial
from http.server import HTTPServer
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
server = HTTPServer(("127.0.0.1", 0), partial(RequestHandler, Storage(use_memory_fs=True)))
print(f"Running on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""
SERVERS = {"s3": ["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], "gs": ["-c", GS_SERVER]}


def run(home: Path, endpoint: str, act: str, scheme: str) -> subprocess.Popen[str]:
    aws = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
    environment = os.environ | {f"AWS_{key}": value for key, value in aws.items()} | {"STORAGE_EMULATOR_HOST": endpoint}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (CLOUDS / "client", ROOT, ROOT / "tests")))
    program = home / "program.py"
    program.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in PROGRAM.splitlines()))
    return subprocess.Popen(
        [sys.executable, str(program), str(home), act, scheme],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_data_in_a_bucket_is_read_prepared_and_safe_from_kills(tmp_path: Path, scheme: str) -> None:
    if not CLOUDS.is_dir():
        pytest.skip("no .clouds/: bash tests/data/sources/install_clouds.sh")
    environment = os.environ | {"PYTHONPATH": str(CLOUDS / scheme)}
    with (tmp_path / "server.log").open("w+") as log:  # a pipe no one reads would fill up and stop it
        server = subprocess.Popen(
            [sys.executable, *SERVERS[scheme]], env=environment, stdout=log, stderr=log, text=True
        )
        try:
            deadline = time.monotonic() + 60
            while not (
                lines := [one for one in (tmp_path / "server.log").read_text().splitlines() if "Running on http" in one]
            ):
                assert time.monotonic() < deadline and server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.1)
            endpoint = lines[0].split()[-1]
            for act in ("upload", "read", "prepare"):
                child = run(tmp_path, endpoint, act, scheme)
                output, _ = child.communicate(timeout=180)
                assert child.returncode == 0, output
            child = run(tmp_path, endpoint, "fetch", scheme)
            cache, deadline = tmp_path / "cache", time.monotonic() + 60
            while not any(p.stat().st_size for p in cache.rglob("*.fetching-*")):
                assert time.monotonic() < deadline and child.poll() is None, child.communicate()[0]
                time.sleep(0.002)
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
            assert not list(cache.rglob("large.bin"))
        finally:
            server.kill()
            server.wait()
