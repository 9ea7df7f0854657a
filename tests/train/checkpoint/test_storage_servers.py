"""The copy of a run on moto's S3, a server that we did not write: conditions, multipart uploads, ranges, lists, deletion.

`make test-oracle`. tests/data/sources/install_clouds.sh fetches moto into .clouds/s3.
"""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from stored_runs import copying_to, step_of_run, steps_there

from data.bucket.bucket import Bucket, ChangedError, StorageError
from launch.lease import LeaseError
from launch.local.ports import reserved_port
from train.checkpoint import copying
from train.checkpoint.__main__ import main
from train.resilience import storage_lease

MOTO = Path(__file__).resolve().parents[3] / ".clouds" / "s3"
RUN = "s3://bucket/runs/a run"
pytestmark = pytest.mark.oracle


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    if not MOTO.is_dir():
        pytest.skip("moto could not be fetched (tests/data/sources/install_clouds.sh)")
    with reserved_port() as port, (tmp_path / "moto.log").open("w") as log:
        address = f"http://127.0.0.1:{port}"
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env={**os.environ, "PYTHONPATH": str(MOTO)}, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=2)
                    break
                except OSError:
                    time.sleep(0.1)
            names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
            for name, value in zip(names, (address, "key", "secret", "us-east-1"), strict=True):
                monkeypatch.setenv(name, value)
            yield
        finally:
            process.kill()
            process.wait()


def test_a_run_in_moto(moto: None, pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with copying_to(RUN, run, keep_last=2) as copy:
        with pytest.raises(LeaseError):
            storage_lease.take(copy.bucket)
        for step in (2, 4, 6):
            path = step_of_run(pair, run, step)
            (path / "large.bin").write_bytes(
                os.urandom(12 << 20)
            )  # three parts; not of the manifest, so it is not copied
            copy.offer(path)
            while copy.needed():
                time.sleep(0.02)
        assert {event.kind for event in copy.collect()} == {"storage_copy"}
        copy.bucket.upload(path / "large.bin", "large.bin")
        copy.bucket.download("large.bin", tmp_path / "large.bin", size=12 << 20)
        assert (tmp_path / "large.bin").read_bytes() == (path / "large.bin").read_bytes()
    bucket = Bucket(RUN)
    assert steps_there(bucket) == [(4, 1), (6, 1)]
    version = bucket.create("once", b"1")
    with pytest.raises(ChangedError):
        bucket.create("once", b"2")
    bucket.replace("once", b"3", version=version)
    with pytest.raises(ChangedError):
        bucket.replace("once", b"4", version=version)
    with pytest.raises(StorageError, match="there is no bucket"):
        Bucket("s3://absent-bucket/x").objects()
    good, notes = copying.run_copy.candidates(bucket)
    event = copying.fetch_newest(bucket, tmp_path / "here", good=good, notes=notes, newer_than=4)
    assert event is not None and event.step == 6 and not notes
    assert main(["list", RUN, "--verify"]) == 0
