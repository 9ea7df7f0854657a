"""Prepared data and sources behind s3://, from a server that speaks S3 (moto), through s3fs. `make test-oracle`.

s3fs and moto come with their own versions of fsspec and aiohttp, so they live in an environment of their own
(tests/data/install_s3.sh), whose packages this test's process is given first.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
S3 = ROOT / ".s3"
pytestmark = pytest.mark.oracle

PROGRAM = """
import os, sys, time
from pathlib import Path
import fsspec, numpy as np, s3fs
from rich.console import Console
from shards import random_documents, write_folder
from data.cache import Activity, RemoteFolder
from data.config import CacheConfig, DataConfig, SourceConfig, TokenizerConfig
from data.dataset import open_dataset
from data.errors import DataError
from data.manifest import read_manifest
from data.prepare import prepare
from data.stream import Stream

home, act = Path(sys.argv[1]), sys.argv[2]
cache = CacheConfig(folder=str(home / "cache"), retries=1)
config = DataConfig(
    folder="s3://bucket/set", sources={"a": SourceConfig(path="-")}, row_tokens=16, shuffle_shards=1, cache=cache
)
if act == "upload":
    system = fsspec.filesystem("s3")
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
    fsspec.filesystem("s3").rm("bucket/set/a.train-00002.bin")
    remote = RemoteFolder("s3://bucket/set", CacheConfig(folder=str(home / "other")), Activity())
    try:
        remote.local("a.train-00002.bin", read_manifest(home / "set").sources["a"].splits["train"][2].files["bin"])
    except DataError as error:
        assert "s3://bucket/set/a.train-00002.bin does not exist" in str(error), error
    else:
        raise AssertionError("it is gone")
elif act == "prepare":
    manifest = prepare(
        DataConfig(folder=str(home / "prepared"), sources={"s": SourceConfig(path="s3://bucket/texts/*.jsonl")},
                   tokenizer=TokenizerConfig(vocab_size=300), row_tokens=16, workers=2, shard_bytes=5000),
        console=Console(quiet=True),
    )
    documents = sum(manifest.sources["s"].count(split, "documents") for split in ("train", "heldout"))
    assert documents == 600 and len(manifest.sources["s"].splits["train"]) > 3, documents
elif act == "fetch":
    from data.manifest import FileFacts
    RemoteFolder("s3://bucket", cache, Activity()).local("large.bin", FileFacts(bytes=64 << 20, sha256="0" * 64))
"""


def run(home: Path, endpoint: str, act: str) -> subprocess.Popen[str]:
    aws = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
    environment = os.environ | {f"AWS_{key}": value for key, value in aws.items()}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (S3 / "client", ROOT, ROOT / "tests")))
    program = home / "program.py"
    program.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in PROGRAM.splitlines()))
    return subprocess.Popen(
        [sys.executable, str(program), str(home), act],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_data_behind_s3_is_read_prepared_and_safe_from_kills(tmp_path: Path) -> None:
    if not S3.is_dir():
        pytest.skip("no .s3/: bash tests/data/install_s3.sh")
    environment = os.environ | {"PYTHONPATH": str(S3 / "server")}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if "Running on http" in line)
        endpoint = line.split()[-1]
        for act in ("upload", "read", "prepare"):
            child = run(tmp_path, endpoint, act)
            output, _ = child.communicate(timeout=180)
            assert child.returncode == 0, output
        child = run(tmp_path, endpoint, "fetch")
        cache, deadline = tmp_path / "cache", time.monotonic() + 60
        while not any(p.stat().st_size for p in cache.rglob("*fetching*")):
            assert time.monotonic() < deadline and child.poll() is None, child.communicate()[0]
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert not list(cache.rglob("large.bin"))
    finally:
        server.kill()
        server.communicate()
