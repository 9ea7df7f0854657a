"""W&B, MLflow and Trackio with their own local stores: after kills, resumes and rewinds, each point is there once.

Needs .trackers/ (tests/train/record/install_trackers.sh); `make test-oracle` runs it.
"""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tracked_run import EVALUATE_EVERY, loss_of
from wandb_server import WandbServer

from recipes.schema.run_folder import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[3]
Points = list[tuple[str, int, float]]
"""(run, step, value)"""


def start(folder: Path, **asked: object) -> str:
    """One start of a run, as a process of its own. -> what it printed"""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TRACKIO_DIR": str(folder.parent / "trackio"),
    }
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/tracked_run.py"), str(folder), json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (-9 if asked.get("kill") else 0), done.stderr
    return done.stdout + done.stderr


def wandb_points(folder: Path, name: str) -> Points:
    """As W&B's own `sync` reads the offline files of all starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    from train.record.trackers.wandb_run import _records

    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in (Record.FromString(content) for content, _ in _records(path)):
            values = {tuple(item.nested_key) or (item.key,): item.value_json for item in record.history.item}
            if (name,) in values:
                assert json.loads(values["step",]) == record.history.step.num
                found.append((path.stem, record.history.step.num, float(values[name,])))
    return found


def mlflow_points(folder: Path, name: str) -> Points:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder.parent}/mlflow.db")
    number = client.get_experiment_by_name("stratum").experiment_id
    runs = client.search_runs([number])
    return [
        (run.info.run_id, m.step, m.value) for run in runs for m in client.get_metric_history(run.info.run_id, name)
    ]


def trackio_points(folder: Path, name: str) -> Points:
    (path,) = (folder.parent / "trackio").glob("stratum*.db")
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    return [(run, step, json.loads(text)[name]) for run, step, text in rows if name in json.loads(text)]


STORES: dict[str, tuple[Callable[[Path], dict[str, object]], Callable[[Path, str], Points], str]] = {
    "wandb": (lambda folder: {"wandb": "offline"}, wandb_points, "heldout_bits_per_byte/a(b)"),
    "mlflow": (
        lambda folder: {"mlflow": f"sqlite:///{folder.parent}/mlflow.db"},
        mlflow_points,
        f"heldout_bits_per_byte/a_b__{hashlib.sha256(b'heldout_bits_per_byte/a(b)').hexdigest()[:8]}",  # it allows no brackets
    ),
    "trackio": (lambda folder: {"trackio": True}, trackio_points, "heldout_bits_per_byte/a(b)"),
}


def expected(folder: Path) -> dict[int, float]:
    """step -> loss, from metrics.jsonl: the last line of a step counts."""
    return {line["step"]: line["loss"] for line in read_metrics(folder / METRICS) if line["kind"] == "step"}


@pytest.mark.oracle
@pytest.mark.parametrize("store", STORES)
def test_no_point_is_doubled_or_lost_over_kills_resumes_and_rewinds(store: str, tmp_path: Path) -> None:
    config, points, heldout = STORES[store]
    folder = tmp_path / "runs" / "mine"
    asked = {"telemetry": config(folder)}
    start(folder, first=0, last=14, kill=True, before_kill_s=4, **asked)  # after the checkpoint of step 8
    start(folder, first=8, last=11, kill=True, **asked)  # at once: the tracker may not have been opened
    start(folder, first=8, last=18, **asked)
    start(folder, first=4, last=20, **asked)  # an earlier checkpoint
    start(folder, first=20, last=21, kill=True, before_kill_s=4, **asked)
    start(folder, first=20, last=24, **asked)
    sent = points(folder, "train/loss")
    assert len({run for run, _, _ in sent}) == 1
    assert sorted(step for _, step, _ in sent) == list(range(1, 25))
    assert {step: value for _, step, value in sent} == expected(folder)
    scores = sorted((step, value) for _, step, value in points(folder, heldout))
    assert scores == [(step, loss_of(step, 0.1) / 2) for step in range(0, 25, EVALUATE_EVERY)]
    assert all(0 <= value <= 1 for _, _, value in points(folder, "time/goodput"))


@pytest.mark.oracle
@pytest.mark.parametrize("store", STORES)
def test_a_changed_recipe_that_rewinds_is_a_new_run_with_the_whole_history(store: str, tmp_path: Path) -> None:
    config, points, _ = STORES[store]
    folder = tmp_path / "runs" / "mine"
    asked = {"telemetry": config(folder)}
    start(folder, first=0, last=12, **asked)
    start(folder, first=8, last=16, lr=0.2, **asked)
    start(folder, first=12, last=20, lr=0.2, **asked)
    by_run: dict[str, dict[int, float]] = {}
    for run, step, value in points(folder, "train/loss"):
        assert step not in by_run.setdefault(run, {})
        by_run[run][step] = value
    first, second = sorted(by_run.values(), key=len)
    assert first == {step: loss_of(step, 0.1) for step in range(1, 13)}
    assert second == expected(folder) and second.keys() == set(range(1, 21))


@pytest.mark.oracle
@pytest.mark.parametrize("store", STORES)
def test_a_store_that_fails_costs_a_tracker_and_not_the_run(store: str, tmp_path: Path) -> None:
    """A file where the store wants a folder, or a folder where it wants a file."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    for blocked in (folder / "wandb", tmp_path / "runs" / "trackio"):
        blocked.write_text("in the way")
    (tmp_path / "runs" / "mlflow.db").mkdir()
    said = start(folder, first=0, last=12, telemetry=STORES[store][0](folder), reports_failure=True)
    assert expected(folder).keys() == set(range(1, 13))
    assert "FAILED" in said


def served(server: WandbServer) -> dict[str, Points]:
    """Run -> its loss by our step and W&B's own, in the order of arrival."""
    return {
        name: [(name, row["step"], row["train/loss"]) for row in run.history if "train/loss" in row]
        for name, run in server.runs.items()
    }


@pytest.mark.oracle
def test_weights_and_biases_online_has_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "mine"
    asked = {"telemetry": {"wandb": "online"}}
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.delenv("WANDB_MODE")
        start(
            folder, first=0, last=14, kill=True, before_kill_s=4, **asked
        )  # W&B uploads every 15 s: nothing has arrived
        start(folder, first=8, last=18, **asked)
        start(folder, first=12, last=20, **asked)
        start(folder, first=16, last=24, lr=0.2, **asked)
        first, second = served(server).values()
        assert all(row["_step"] == row["step"] for run in server.runs.values() for row in run.history)
    assert [(step, value) for _, step, value in first] == [(step, loss_of(step, 0.1)) for step in range(1, 21)]
    assert [(step, value) for _, step, value in second] == list(expected(folder).items())


@pytest.mark.oracle
def test_weights_and_biases_synchronised_later_has_each_point_once(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    asked = {"telemetry": {"wandb": "offline"}}
    start(folder, first=0, last=14, kill=True, before_kill_s=2, **asked)
    identity = json.loads((folder / "trackers" / "weights_and_biases.json").read_text())["identity"]
    empty = folder / "wandb" / f"offline-run-20200101_000000-{identity}" / f"run-{identity}.wandb"
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.write_bytes(b":W&B\x42\xe1\xbe")  # no record yet: as a kill leaves it
    start(folder, first=8, last=18, **asked)
    start(folder, first=12, last=24, **asked)
    with WandbServer() as server:
        offline = sorted(str(path) for path in (folder / "wandb").glob("offline-run-*"))
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}
        command = [sys.executable, "-m", "wandb", "sync", *offline]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(server.runs) == 1, done.stdout + done.stderr
        (points,) = served(server).values()
    assert [(step, value) for _, step, value in points] == [(step, loss_of(step, 0.1)) for step in range(1, 25)]


@pytest.mark.oracle
def test_a_run_that_changes_between_online_and_offline_has_each_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "mine"
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.delenv("WANDB_MODE")
        for mode, first, last in (("offline", 0, 6), ("online", 4, 12), ("offline", 9, 18), ("online", 14, 22)):
            start(folder, first=first, last=last, telemetry={"wandb": mode})
        offline = sorted(str(path) for path in (folder / "wandb").glob("offline-run-*"))
        command = [sys.executable, "-m", "wandb", "sync", *offline]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (points,) = served(server).values()
    assert sorted((step, value) for _, step, value in points) == [(step, loss_of(step, 0.1)) for step in range(1, 23)]
