"""Real processes with `run.storage`: killed, its disk lost, and continued on an empty machine as if nothing had happened."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from object_server import SECRET, object_server
from processes import finish, losses, start, wait_for_step

from data.bucket.bucket import Bucket
from launch.lease import LeaseError
from launch.runs import RunFolder
from launch.status import main as status
from recipes.schema.run_folder import METRICS, read_metrics
from train.resilience.storage_lease import take

STEPS = 240
"""Enough to be killed in the middle."""


@pytest.mark.slow
def test_a_run_whose_disk_is_lost_continues_from_storage(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, f"run.steps={STEPS}"]
    finish(start(words, "whole"))
    whole = losses(tmp_path / "whole")
    with object_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        stored = ("run.storage=s3://bucket/runs", "checkpoint.keep_local=1", "run.device=cpu")
        run = tmp_path / "stored"
        child = start(words, "stored", extra=stored)
        wait_for_step(run, 8, child)
        while not server.names("manifest.json"):
            time.sleep(0.01)
        with pytest.raises(LeaseError, match=f"belongs to process {child.pid}"):
            take(Bucket("s3://bucket/runs/stored"))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        shutil.rmtree(run)

        output = finish(start(words, "stored", extra=stored))
        assert "fetched from s3://bucket/runs/stored" in output and "copied to s3://bucket/runs/stored/check" in output
        lines = read_metrics(run / METRICS)
        (begin,) = {line["step"] for line in lines if line["kind"] == "resume"}
        found = losses(run)
        assert begin >= 6 and {step: found[step] for step in range(begin + 1, STEPS + 1)} == {
            step: whole[step] for step in range(begin + 1, STEPS + 1)
        }
        assert server.objects["bucket/runs/stored/metrics.jsonl"] == (run / METRICS).read_bytes()
        assert server.names(f"step_{STEPS:08d}-0002/manifest.json")
        text = b"".join([*server.objects.values(), (run / "recipe.yaml").read_bytes()])
        assert SECRET.encode() not in text, "credentials are nowhere"
    assert len(list((run / "checkpoints").glob("step_*"))) <= 2, "the newest, and one whose copy had begun"
    assert status([str(run)]) == 0
    assert f"storage s3://bucket/runs: step {STEPS} is copied" in capsys.readouterr().out
    assert RunFolder(run).storage_line()
