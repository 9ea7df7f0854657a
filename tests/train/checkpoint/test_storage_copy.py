"""Checkpoints in object storage: whole or absent after a kill at any request, faults, two writers, retention, an empty machine.

The server is `object_server`; `test_storage_servers.py` runs the same on a server that we did not write.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from object_server import SECRET, ObjectServer, Request, object_server
from ranks import run_ranks
from stored_runs import FAST, copying_to, step_of_run, steps_there
from tiny import RECIPE

from data.bucket import bucket as door
from data.bucket import run_copy
from data.bucket.bucket import Bucket, ChangedError, StorageError, UnreachableError
from launch.lease import LeaseError, myself
from recipes.schema.checkpoint import CheckpointConfig
from recipes.schema.errors import CheckpointError, RecipeError, refuse
from recipes.schema.manifest import MANIFEST, manifest_text, read_manifest
from recipes.schema.run_folder import METRICS, name_of
from recipes.schema.storage_rules import storage_problems
from train.checkpoint import copying
from train.checkpoint.__main__ import main
from train.checkpoint.copying import StorageCopy
from train.checkpoint.manager import CheckpointFolder
from train.resilience import storage_lease

RUN = "s3://bucket/runs/a run"
PUT_MANIFEST = f"/{MANIFEST}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    with object_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(door, "PART_BYTES", 64 << 10)  # several parts for each file
        yield server


KILLED = """
import os, sys
from pathlib import Path
import obstore
from data.bucket import bucket, run_copy
bucket.PART_BYTES = 128 << 10
for number in range(int(sys.argv[1])):
    if not (pid := os.fork()):
        to = bucket.Bucket(f"s3://bucket/{number}-{os.getpid()}/run")
        stored = run_copy.publish(to, Path(sys.argv[2]), owner=1, may_publish=lambda: True)
        run_copy.point_at(to, stored.name, owner=1)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_a_kill_at_any_request_leaves_a_whole_step_or_none(server: ObjectServer, pair: Path) -> None:
    """Writer n dies at its request n // 2: before the server carries it out, or after it did."""
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def kill(request: Request) -> str:
        place = next(p for p in (*request.key.split("/"), *request.query.get("prefix", "").split("/")) if "-" in p)
        number, pid = map(int, place.split("-"))
        with lock:
            at, seen[place] = seen.get(place, 0), seen.get(place, 0) + 1
        if at != number // 2:
            return ""
        os.kill(pid, signal.SIGKILL)
        return "lost" if number % 2 else "cut"

    server.fault = kill
    folder = step_of_run(pair, Path(pair.parent, "killed"), 6)
    writers = 2 * (
        7 + sum(-(-size // (128 << 10)) + 2 * (size > 128 << 10) for size in read_manifest(folder).files.values())
    )
    subprocess.run([sys.executable, "-c", KILLED, str(writers), str(folder)], check=True)
    server.fault = lambda request: ""
    whole = []
    for number in range(writers):
        prefix = next(place for place in seen if place.startswith(f"{number}-"))
        published = any(PUT_MANIFEST in name for name in server.names(prefix))
        assert steps_there(Bucket(f"s3://bucket/{prefix}/run", retries=FAST)) == [(6, 1)] * published
        whole.append(published)
    assert whole == sorted(whole) and not whole[6] and whole[-1], "absent, and from the manifest on whole"


@pytest.mark.parametrize("fault", ["500", "cut", "lost", "slow"])
def test_faults_of_the_server_are_overcome(fault: str, server: ObjectServer, pair: Path, tmp_path: Path) -> None:
    chosen = {"slow": 9}.get(fault, 3)
    server.fault = lambda request: fault if request.number % chosen == 1 else ""
    step_of_run(pair, tmp_path / "run", 6)
    with copying_to(RUN, tmp_path / "run", retries=3) as copy:
        copy.offer(tmp_path / "run" / "checkpoints" / name_of(6))
        copy.finish()
        assert [event.kind for event in copy.collect()][-1] == "storage_copy"
        (stored, manifest), *_ = run_copy.candidates(copy.bucket)[0]
        notes: list[str] = []
        path = copying.fetch_step(copy.bucket, stored, manifest, tmp_path / "other", notes)
    assert path is not None and not notes
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints" / name_of(6)).iterdir()
    }
    assert len(server.names(PUT_MANIFEST)) == 1


def test_a_lost_answer_does_not_look_like_another_writer(server: ObjectServer) -> None:
    bucket = Bucket(RUN, retries=FAST)
    server.fault = lambda request: "lost" if request.number == 0 else ""
    first = bucket.create("owner.json", b"mine")
    with pytest.raises(ChangedError):
        bucket.create("owner.json", b"another's")
    at = len(server.requests)
    server.fault = lambda request: "lost" if request.number == at else ""
    second = bucket.replace("owner.json", b"mine, newer", version=first)
    with pytest.raises(ChangedError):
        bucket.replace("owner.json", b"late", version=first)
    assert bucket.read("owner.json") == (b"mine, newer", second)


def test_googles_interface_has_the_same_conditions(server: ObjectServer, pair: Path, tmp_path: Path) -> None:
    """Generations instead of tags (x-goog-if-generation-match). Google's own server was not tried."""
    bucket = Bucket("gs://bucket/runs/a run", retries=FAST)
    first = bucket.create("owner.json", b"mine")
    with pytest.raises(ChangedError):
        bucket.create("owner.json", b"another's")
    bucket.replace("owner.json", b"newer", version=first)
    with pytest.raises(ChangedError):
        bucket.replace("owner.json", b"late", version=first)
    stored = run_copy.publish(bucket, pair / name_of(4), owner=1, may_publish=lambda: True)
    ((found, manifest),), _ = run_copy.candidates(bucket)
    assert copying.fetch_step(bucket, found, manifest, tmp_path, []) == tmp_path / name_of(4)
    run_copy.delete(bucket, stored)
    assert server.names() == ["runs/a run/owner.json"]


def from_another_machine(server: ObjectServer, *, beats: bool = False) -> dict[str, object]:
    """Write the lease of a trainer on another machine, of which nothing is known but its heartbeats."""
    owner = replace(myself(), host="elsewhere", machine="another boot")
    value = {"number": 3, "owner": asdict(owner), "beat": 0}
    server.objects["bucket/runs/a run/owner.json"] = json.dumps(value).encode()
    server.generations["bucket/runs/a run/owner.json"] = 1
    return value


def test_a_second_writer_is_refused_until_the_first_releases_or_dies(server: ObjectServer) -> None:
    bucket = Bucket(RUN, retries=FAST)
    first = storage_lease.take(bucket)
    with pytest.raises(LeaseError, match="still running"):
        storage_lease.take(bucket)
    first.release()
    second = storage_lease.take(bucket)
    assert (first.number, second.number) == (1, 2)
    second.release()

    value = from_another_machine(server)

    def beat(request: Request) -> str:  # the other machine shows a sign of life
        value["beat"] = request.number
        server.objects["bucket/runs/a run/owner.json"] = json.dumps(value).encode()
        return ""

    server.fault = beat
    with pytest.raises(LeaseError, match="elsewhere"):
        storage_lease.take(bucket, expiry_s=0.4)
    server.fault = lambda request: ""
    third = storage_lease.take(bucket, expiry_s=0.4)
    assert third.number == 4
    third.release()


def test_a_writer_that_was_taken_for_dead_publishes_nothing(server: ObjectServer, pair: Path, tmp_path: Path) -> None:
    path = step_of_run(pair, tmp_path / "run", 6)
    with copying_to(RUN, tmp_path / "run") as copy:
        from_another_machine(server)  # it took over while this one was stopped
        copy.offer(path)
        copy.finish()
        (event,) = copy.collect()
        assert event.kind == "storage_failed" and "belongs to another process now" in event.fields["error"]
    assert not server.names(PUT_MANIFEST)
    assert json.loads(server.objects["bucket/runs/a run/owner.json"])["number"] == 3, (
        "it does not release another's lease"
    )


def test_a_lease_lost_between_two_copies_is_said_and_can_end_the_run(server: ObjectServer, tmp_path: Path) -> None:
    with copying_to(RUN, tmp_path / "run", on_storage_failure="stop") as copy:
        from_another_machine(server)
        assert not copy._lease.renew()
        copy.finish()
        (event,) = copy.collect()
        assert event.kind == "storage_failed" and "belongs to another process now" in event.fields["error"]
        config = CheckpointConfig(on_storage_failure="stop")
        assert CheckpointFolder(tmp_path / "run/checkpoints", config, copy=copy).storage_has_failed


def test_a_released_lease_permits_no_copy(server: ObjectServer, pair: Path, tmp_path: Path) -> None:
    bucket = Bucket(RUN, retries=FAST)
    lease = storage_lease.take(bucket)
    lease.release()
    with pytest.raises(StorageError, match="not published"):
        run_copy.publish(bucket, step_of_run(pair, tmp_path, 6), owner=1, may_publish=lease.renew)


def test_a_published_step_keeps_its_bytes_if_the_same_owner_has_another_one(
    server: ObjectServer, pair: Path, tmp_path: Path
) -> None:
    bucket = Bucket(RUN, retries=FAST)
    first, again = step_of_run(pair, tmp_path / "a", 6), step_of_run(pair, tmp_path / "b", 6)
    run_copy.publish(bucket, first, owner=1, may_publish=lambda: True)
    before = dict(server.objects)
    manifest = read_manifest(again)  # a run that went back before step 6 reaches it again, with other numbers
    name = next(name for name in manifest.files if name.endswith(".safetensors"))
    (again / name).write_bytes((again / name).read_bytes() + b"more")
    files = manifest.files | {name: (again / name).stat().st_size}
    (again / MANIFEST).write_text(manifest_text(replace(manifest, files=files)))
    with pytest.raises(StorageError, match="already has another checkpoint"):
        run_copy.publish(bucket, again, owner=1, may_publish=lambda: True)
    assert server.objects == before


def test_the_step_just_copied_stays_although_a_newer_damaged_one_is_there(
    server: ObjectServer, pair: Path, tmp_path: Path
) -> None:
    bucket = Bucket(RUN, retries=FAST)
    run_copy.publish(bucket, step_of_run(pair, tmp_path / "old", 9), owner=1, may_publish=lambda: True)
    server.objects.pop("bucket/" + server.names("step_00000009-0001/index")[0])
    server.objects.pop("bucket/runs/a run/owner.json", None)
    with copying_to(RUN, tmp_path / "run", keep_last=1) as copy:
        for step in (5, 6):  # the run continued from a step before the damaged one
            copy.offer(step_of_run(pair, tmp_path / "run", step))
            while copy.needed():
                time.sleep(0.01)
    assert steps_there(bucket) == [(6, 1)]


def test_two_writers_of_one_step_never_mix_and_the_newer_owner_counts(
    server: ObjectServer, pair: Path, tmp_path: Path
) -> None:
    bucket = Bucket(RUN, retries=FAST)
    old, new = step_of_run(pair, tmp_path / "a", 6), step_of_run(pair, tmp_path / "b", 6)
    manifest = read_manifest(new)
    (new / MANIFEST).write_text(manifest_text(replace(manifest, position=99)))
    run_copy.publish(bucket, new, owner=8, may_publish=lambda: True)
    run_copy.point_at(bucket, "step_00000006-0008", owner=8)
    run_copy.publish(bucket, old, owner=7, may_publish=lambda: True)  # a late one
    run_copy.point_at(bucket, "step_00000006-0007", owner=7)
    ((stored, found),), notes = run_copy.candidates(bucket)
    assert (stored.owner, found.position, notes) == (8, 99, [])
    assert json.loads(bucket.read("latest")[0])["step"] == "step_00000006-0008"
    with pytest.raises(StorageError, match="already has another checkpoint"):
        run_copy.publish(bucket, old, owner=8, may_publish=lambda: True)


def test_the_same_steps_are_kept_here_and_there(server: ObjectServer, pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    leftover = "bucket/runs/a run/checkpoints/step_00000001-0000/rank_00000.safetensors"
    server.objects[leftover], server.generations[leftover] = b"half", 1
    config = CheckpointConfig(keep_last=2, keep_every_steps=4, keep_local=1)
    with copying_to(RUN, run, keep_last=2, keep_every_steps=4, keep_local=1) as copy:
        folder = CheckpointFolder(run / "checkpoints", config, copy=copy)
        for step in range(1, 8):
            copy.offer(step_of_run(pair, run, step))
            while copy.needed():
                time.sleep(0.01)
            folder._retain(step)
            (run / METRICS).write_text(f'{{"kind": "step", "step": {step}}}\n')
    assert "warning" not in {event.kind for event in copy.collect()}
    assert steps_there(copy.bucket) == [(4, 1), (6, 1), (7, 1)]
    assert not server.names("step_00000001"), "what a killed writer left is removed"
    assert [path.name for path in folder.published()] == [name_of(7)], "the budget of this disk"
    assert server.objects["bucket/runs/a run/metrics.jsonl"] == (run / METRICS).read_bytes(), "the last lines too"


def test_a_slow_storage_skips_steps_and_keeps_what_it_still_needs(
    server: ObjectServer, pair: Path, tmp_path: Path
) -> None:
    run, released = tmp_path / "run", threading.Event()
    server.fault = lambda request: (released.wait(10) and "") or ""  # type: ignore[func-returns-value]
    config = CheckpointConfig(keep_last=1, keep_every_steps=4, keep_local=1)
    bucket = Bucket(RUN, retries=replace(FAST, timeout_s=20.0))
    released.set()
    lease = storage_lease.take(bucket)
    released.clear()
    copy = StorageCopy(bucket, lease, run=run, config=config)
    folder = CheckpointFolder(run / "checkpoints", config, copy=copy)
    for step in (3, 4, 5, 6, 7):
        copy.offer(step_of_run(pair, run, step))
        time.sleep(0.05)  # the copy of step 3 has begun
        folder._retain(step)
    assert [path.name for path in folder.published()] == [name_of(3), name_of(4), name_of(7)]
    released.set()
    copy.close(has_failed=False)
    assert {event.step for event in copy.collect() if event.kind == "storage_copy"} == {3, 4, 7}


def test_an_outage_is_said_and_overcome_or_ends_the_run(server: ObjectServer, pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with copying_to(RUN, run, on_storage_failure="stop") as copy:
        server.fault = lambda request: "403"
        copy.offer(step_of_run(pair, run, 2))
        folder = CheckpointFolder(run / "checkpoints", CheckpointConfig(on_storage_failure="stop"), copy=copy)
        while not folder.storage_has_failed:
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match=r"refuses the credentials.*The checkpoints in .* are intact"):
            folder.check_storage()
        patient = CheckpointFolder(run / "checkpoints", CheckpointConfig(), copy=copy)
        assert not patient.storage_has_failed
        server.fault = lambda request: ""
        copy.offer(step_of_run(pair, run, 3))
        copy.finish()
        assert [(event.kind, event.step) for event in copy.collect()] == [("storage_failed", 2), ("storage_copy", 3)]
        assert copy.error is None


class SlowCopy:
    """A copy whose end takes longer than a collective operation may."""

    def finish(self) -> None:
        time.sleep(1.2)


def wait_for_the_end(rank: int) -> float:
    """Two ranks at the end of a run with a storage; then another collective operation, as with copies in memory."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=0.8))
    copying._SIGN_OF_LIFE_S = 0.1
    copy = SlowCopy() if rank == 0 else None
    folder = CheckpointFolder(Path("unused"), CheckpointConfig(), copy=copy)  # type: ignore[arg-type]
    folder.finish_storage(SimpleNamespace(saving=dist.group.WORLD))  # type: ignore[arg-type]
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return float(total)


def test_a_last_copy_longer_than_the_time_out_does_not_fail_the_other_ranks() -> None:
    assert run_ranks(2, wait_for_the_end) == [2.0, 2.0]


def test_an_empty_machine_starts_from_the_newest_step_that_verifies(
    server: ObjectServer, pair: Path, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for step in (2, 4, 6):
        step_of_run(pair, there, step)
    (there / METRICS).write_text('{"kind": "step", "step": 6}\n')
    (there / "recipe.yaml").write_text("run: {name: x}\n")
    with copying_to(RUN, there, keep_last=9) as copy:
        for step in (2, 4, 6):
            copy.offer(there / "checkpoints" / name_of(step))
            while copy.needed():
                time.sleep(0.01)
    (name,) = server.names("step_00000006-0001/rank_00000")
    content = bytearray(server.objects[f"bucket/{name}"])
    content[-1] ^= 1
    server.objects[f"bucket/{name}"] = bytes(content)
    server.objects.pop("bucket/" + server.names("step_00000002-0001/index")[0])

    recipe = replace(RECIPE, run=replace(RECIPE.run, name="a run", storage="s3://bucket/runs"))
    copy = copying._open(recipe, here, RUN)
    assert copy.collect()[0].step == 4
    copy.close(has_failed=False)
    assert read_manifest(here / "checkpoints" / name_of(4)).step == 4
    assert (here / METRICS).read_bytes() == (there / METRICS).read_bytes()

    with pytest.raises(CheckpointError, match="resume=never"):
        copying._open(replace(recipe, checkpoint=replace(recipe.checkpoint, resume="never")), tmp_path / "c", RUN)
    assert main(["verify", f"{RUN}/checkpoints/step_00000006-0001"]) == 1
    assert main(["verify", f"{RUN}/checkpoints/step_00000004-0001"]) == 0
    assert main(["show", f"{RUN}/checkpoints/step_00000004-0001"]) == 0
    assert main(["list", RUN]) == 1, "step 2 lacks an object"
    assert main(["fetch", RUN, str(tmp_path / "records"), "--records"]) == 0
    assert main(["fetch", f"{RUN}/checkpoints/step_00000004-0001", str(tmp_path / "d")]) == 0
    assert main(["fetch", RUN, str(tmp_path / "d")]) == 2, "it does not mix two runs"
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [METRICS, "recipe.yaml"]
    assert main(["fetch", RUN, str(tmp_path / "records"), "--records"]) == 0, "again, for the newest lines"
    (tmp_path / "records" / METRICS).write_text("another run\n")
    assert main(["fetch", RUN, str(tmp_path / "records"), "--records"]) == 2
    assert (tmp_path / "records" / METRICS).read_text() == "another run\n", "it replaces no other run's records"


def test_a_fetch_that_is_cut_off_before_the_metrics_costs_no_lines(
    server: ObjectServer, pair: Path, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    recipe = replace(RECIPE, run=replace(RECIPE.run, name="a run", storage="s3://bucket/runs"))
    with copying_to(RUN, there) as copy:
        copy.offer(step_of_run(pair, there, 6))
        (there / METRICS).write_text("a\nb\n")
    here.mkdir()
    (here / METRICS).write_text("a\n")
    server.fault = lambda request: "403" if request.method == "GET" and request.key.endswith(METRICS) else ""
    with pytest.raises(StorageError):
        copying._open(recipe, here, RUN)
    server.fault = lambda request: ""
    copying._open(recipe, here, RUN).close(has_failed=False)
    assert server.objects[f"bucket/runs/a run/{METRICS}"] == b"a\nb\n"


def test_lines_that_only_this_disk_has_are_not_lost(server: ObjectServer, pair: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    with copying_to(RUN, there) as copy:
        (there / "checkpoints").mkdir(parents=True)
        (there / METRICS).write_text("a\nb\n")
        copy.offer(step_of_run(pair, there, 6))
        copy.finish()
        for content, left in (("a\n", 0), ("other\n", 1)):
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            (here / METRICS).write_text(content)
            good, notes = run_copy.candidates(copy.bucket)
            copying.fetch_newest(copy.bucket, here, good=good, notes=notes, newer_than=-1)
            assert (here / METRICS).read_text() == "a\nb\n"
            assert [p.read_text() for p in here.glob("metrics-before-step-6-*")] == [content] * left


def test_an_address_with_a_password_is_refused_and_not_repeated() -> None:
    for address in (
        "s3://me:pw@bucket/runs",
        "s3://bucket/runs?token=abcdefgh",
        "https://bucket/runs",
        "s3://",
        "s3://b/../c",
    ):
        recipe = replace(RECIPE, run=replace(RECIPE.run, storage=address))
        with pytest.raises(RecipeError, match=r"run\.storage") as caught:
            refuse(storage_problems(recipe))
        assert "pw" not in str(caught.value) and "abcdefgh" not in str(caught.value)
        with pytest.raises(StorageError):
            Bucket(address)
    assert not storage_problems(replace(RECIPE, run=replace(RECIPE.run, storage="gs://bucket/runs/of team/")))


def test_keys_come_from_the_standard_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = K\naws_secret_access_key = S\n[b]\nx = 1\n")
    (tmp_path / "config").write_text("[default]\nregion = eu-north-1\n[profile b]\nregion = eu-west-1\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert door._aws_files() == {"region": "eu-north-1", "aws_access_key_id": "K", "aws_secret_access_key": "S"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    monkeypatch.setenv("AWS_PROFILE", "b")
    assert door._aws_files() == {"region": "eu-west-1"}


def test_what_cannot_work_is_said_with_the_address(server: ObjectServer) -> None:
    with pytest.raises(StorageError, match=r"there is no bucket s3://absent\. Create"):
        Bucket("s3://absent/x", retries=FAST).objects()
    server.fault = lambda request: "403"
    with pytest.raises(StorageError, match="refuses the credentials") as caught:
        Bucket(RUN, retries=FAST).create("x", b"")
    assert caught.value.status == 2 and SECRET not in str(caught.value)
    server.fault = lambda request: "500"
    with pytest.raises(UnreachableError) as unreachable:
        Bucket(RUN, retries=FAST).create("x", b"")
    assert unreachable.value.status == 1, "a launcher restarts the run"
