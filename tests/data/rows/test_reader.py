"""Reading bad, changing and distant files: an error that names the file before a model sees a wrong token."""

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from shards import random_documents, write_folder

from data.batch import Batch
from data.dataset import Dataset, open_dataset
from data.store.cache import LEDGER, Activity, RemoteFolder
from data.store.manifest import MANIFEST, Manifest, read_manifest
from data.store.verify import VERIFIED, Verifier
from data.stream import Stream
from recipes.schema.data import CacheConfig, DataConfig, SourceConfig
from recipes.schema.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = random_documents(90, seed=1)
    write_folder(tmp_path / "data", {"a": [documents[:30], documents[30:60], documents[60:]]})
    return tmp_path / "data"


@pytest.fixture(params=["compiled", "plain"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With compiled reading, and without a compiler."""
    if request.param == "plain":
        monkeypatch.setattr("data.native.rows.library", lambda: None)


def config_of(folder: Path | str, **changes: object) -> DataConfig:
    fields = {"folder": str(folder), "sources": {"a": SourceConfig(path="-")}, "row_tokens": 16} | changes
    return DataConfig(**fields)  # type: ignore[arg-type]


SHARD = "a.train-00001"


def flip(path: Path, at: int = 40, *, keep_time: bool = False) -> None:
    """Change one byte in place."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def other_dtype(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    assert raw[17] == 8
    raw[17] = 3
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("bin", truncate, "bytes long, but the manifest says"),
        ("bin", empty, "0 bytes long, but the manifest says"),
        ("idx", empty, "0 bytes long, but the manifest says"),
        ("bin", flip, "does not match its checksum"),
        ("idx", lambda path: flip(path, -8 + os.path.getsize(path)), "does not match its checksum"),
        ("idx", other_dtype, "does not match its checksum"),
        ("bin", os.remove, "is missing"),
    ],
)
@pytest.mark.parametrize("opened_before", [False, True])
def test_damage_is_found_when_data_is_opened(folder: Path, suffix, damage, message: str, opened_before: bool) -> None:
    if opened_before:
        open_dataset(config_of(folder))
        assert (folder / VERIFIED).exists()
    path = folder / f"{SHARD}.{suffix}"
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(config_of(folder))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_what_each_mode_finds_of_a_change_that_hides(folder: Path, mode: str) -> None:
    """A byte changed with the old time put back: only `always` reads everything again."""
    open_dataset(config_of(folder, verify=mode))
    flip(folder / f"{SHARD}.bin", keep_time=True)
    if mode == "always":
        with pytest.raises(DataError, match="checksum"):
            open_dataset(config_of(folder, verify=mode))
    else:
        open_dataset(config_of(folder, verify=mode))


def test_checksums_are_taken_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    from data.store import verify

    real = verify.file_sha256
    monkeypatch.setattr(verify, "file_sha256", lambda path: (hashed.append(path.name), real(path))[1])
    open_dataset(config_of(folder))
    assert len(hashed) == 8
    open_dataset(config_of(folder))
    assert len(hashed) == 8
    os.utime(folder / f"{SHARD}.bin")  # touched, not changed
    open_dataset(config_of(folder))
    assert hashed[8:] == [f"{SHARD}.bin"]


@pytest.mark.usefixtures("either_way")
def test_sets_beyond_the_budget_are_named_not_read(folder: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("data.store.verify.BUDGET_BYTES", 100)
    flip(folder / f"{SHARD}.bin")
    dataset = open_dataset(config_of(folder))
    assert "have not been compared" in caplog.text and "stratum inspect" in caplog.text
    dataset.training_rows(np.arange(dataset.train[0].count))
    flip(folder / f"{SHARD}.bin")  # put right again, but changed since it was first seen
    dataset.training_rows(np.arange(5))
    flip(folder / f"{SHARD}.bin")
    with pytest.raises(DataError, match="does not match its checksum"):
        dataset.training_rows(np.arange(dataset.train[0].count))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
@pytest.mark.parametrize("verify", ["auto", "never"])
@pytest.mark.parametrize("how", ["in place", "by rename", "cut short"])
def test_a_shard_replaced_while_it_is_read_is_named(
    folder: Path, how: str, verify: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.rows.reader._STAT_EVERY_S", 0.0)
    dataset = open_dataset(config_of(folder, verify=verify, packing=packing))
    every = np.arange(dataset.train[0].count)
    dataset.training_rows(every)
    path = folder / f"{SHARD}.bin"
    match how:
        case "in place":
            flip(path)
        case "by rename":
            other = path.with_suffix(".new")
            other.write_bytes(path.read_bytes()[:-2] + b"\x07\x00")
            other.rename(path)
        case "cut short":
            os.truncate(path, 60)
    with pytest.raises(DataError, match=r"a\.train-00001\.bin"):
        dataset.training_rows(every)


@pytest.mark.usefixtures("either_way")
def test_a_shard_put_back_unchanged_is_read_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.rows.reader._STAT_EVERY_S", 0.0)
    dataset = open_dataset(config_of(folder))
    every = np.arange(dataset.train[0].count)
    before = dataset.training_rows(every)
    path = folder / f"{SHARD}.bin"
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)
    assert (dataset.training_rows(every).tokens == before.tokens).all()


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_files_cut_short_under_a_running_stream_end_it_with_their_name(
    folder: Path, suffix: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real truncation, in the middle of reading rows with their boundaries; a memory map would end the process (SIGBUS).

    kept: indices of up to so many documents are read whole when a shard is opened, so that cutting them changes nothing.
    """
    monkeypatch.setattr("data.rows.reader._STAT_EVERY_S", 0.0)
    monkeypatch.setattr("data.rows.reader._STARTS_IN_MEMORY", kept)
    dataset = open_dataset(config_of(folder, reset_at_documents=True, verify="never"))
    good = [dataset.training_rows(np.arange(at, at + 8)) for at in range(0, 400, 8)]
    with Stream(
        dataset, position=0, global_rows=8, microbatch_rows=8, rank=0, ranks=1, prefetch_steps=2, threads=2
    ) as stream:
        next(stream)
        os.truncate(folder / f"{SHARD}.{suffix}", 60)
        if suffix == "idx" and kept:
            for wanted in good[1:]:
                (batch,) = next(stream)
                assert (batch.labels == wanted.labels).all() and (batch.document_index == wanted.document_index).all()
            return
        with pytest.raises(DataError, match=rf"a\.train-00001\.{suffix} "):
            for _ in range(50):
                next(stream)


@pytest.mark.usefixtures("either_way")
def test_rows_are_the_same_with_few_open_shards_and_few_stored_packings(folder: Path, monkeypatch) -> None:
    def read(dataset: Dataset) -> list[Batch]:
        return [dataset.training_rows(np.arange(at, at + 3)) for at in range(0, 2 * dataset.train[0].count, 3)]

    for packing in ("chunk", "best_fit"):
        config = config_of(folder, packing=packing, reset_at_documents=True)
        expected = read(open_dataset(config))
        with monkeypatch.context() as patch:
            patch.setattr("data.rows.reader._OPEN_SHARDS", 2)
            patch.setattr("data.rows.reader._STARTS_IN_MEMORY", 40)  # of one of the three shards
            dataset = open_dataset(config)
            for one, two in zip(read(dataset), expected, strict=True):
                assert (one.labels == two.labels).all() and (one.document_index == two.document_index).all()
            pool = dataset.train[0].stream._pool
            kept = pool._open._values.values()
            assert len(kept) == 2
            assert pool._open.weight == sum(shard.starts_in_memory for shard in kept) <= 40


@pytest.mark.parametrize(
    ("soft", "hard", "room", "after"), [(600, 600, 44, 600), (256, 20_000, 4096, 8704), (64, 64, 16, 64)]
)
def test_the_limit_of_open_files_is_raised_or_respected(soft: int, hard: int, room: int, after: int) -> None:
    program = (
        "import resource; from data.rows.reader import _room_for_shards\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "print(_room_for_shards(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip("this machine allows fewer open files")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [str(room), str(after)]


def rewrite(folder: Path, **changes: object) -> None:
    """Change the manifest's entry of the second shard, checksums and all, as a wrong tool would."""
    manifest = read_manifest(folder)
    source = manifest.sources["a"]
    entries = list(source.splits["train"])
    entries[1] = replace(entries[1], **changes)  # type: ignore[arg-type]
    source = replace(source, splits=source.splits | {"train": entries})
    text = json.dumps(asdict(Manifest(manifest.tokenizer, manifest.request, {"a": source})))
    (folder / MANIFEST).write_text(text)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int32"}, "has tokens of type uint16, but the manifest says int32"),
        ({"tokens": 100}, "tokens, but the manifest says 100"),
        ({"documents": 31}, "documents, but the manifest says 31"),
        ({"first_document": 3}, "documents, but the manifest says 33"),
    ],
)
def test_index_and_manifest_that_disagree(folder: Path, changes: dict, message: str) -> None:
    rewrite(folder, **changes)
    dataset = open_dataset(config_of(folder))
    with pytest.raises(DataError, match=message) as caught:
        dataset.training_rows(np.arange(dataset.train[0].count))
    assert SHARD in str(caught.value)


@pytest.mark.usefixtures("either_way")
def test_ids_beyond_the_vocabulary_are_named_with_their_shard(folder: Path) -> None:
    bad = np.array([5, 6, 299, 0])
    manifest = write_folder(folder / "big", {"a": [random_documents(60, seed=2), [bad] * 20]})
    path = folder / "big" / f"{SHARD}.bin"
    raw = np.frombuffer(path.read_bytes(), dtype="<u2").copy()
    raw[raw == 299] = 61_000
    path.write_bytes(raw.tobytes())
    from data.store.manifest import file_facts

    entry = manifest.sources["a"].splits["train"][1]
    rewrite(folder / "big", files=entry.files | {"bin": file_facts(path)})
    dataset = open_dataset(config_of(folder / "big"))
    with pytest.raises(
        DataError, match=r"a.train-0000[01].bin contains token id 61,000 .* outside the vocabulary of 300"
    ):
        dataset.training_rows(np.arange(dataset.train[0].count))


def test_documents_and_tokens_of_a_run_of_documents(folder: Path, tmp_path: Path) -> None:
    """An entry that begins inside a shard, as one of an existing Megatron set does."""
    documents = random_documents(90, seed=1)
    start = sum(len(d) for d in documents[30:40])
    rewrite(folder, first_document=10, documents=20, tokens=sum(len(d) for d in documents[40:60]))
    rows = open_dataset(config_of(folder)).train[0]
    stream = np.concatenate(documents[:30] + documents[40:])
    assert rows.stream.tokens == len(stream) and start > 0
    out = np.empty(len(stream), dtype=np.uint16)
    rows.stream.read(0, out)
    assert np.array_equal(out, stream)
    starts, first = rows.stream.document_starts(0, rows.stream.tokens)
    assert first == 0 and np.array_equal(
        starts, np.cumsum([0, *(len(d) for d in documents[:30] + documents[40:])])[:-1]
    )
    assert rows.stream.document_span(30) == (starts[30], starts[31])


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def upload(system: fsspec.AbstractFileSystem, folder: Path) -> None:
    for path in folder.iterdir():
        system.pipe(f"/bucket/set/{path.name}", path.read_bytes())


def test_shards_behind_a_url_are_read_like_local_ones(folder: Path, store, tmp_path: Path) -> None:
    upload(store, folder)
    local = open_dataset(config_of(folder))
    far = open_dataset(config_of("memory://bucket/set", cache=CacheConfig(folder=str(tmp_path / "cache"))))
    every = np.arange(2 * local.train[0].count)
    assert (far.training_rows(every).labels == local.training_rows(every).labels).all()
    store.rm("/bucket/set/a.train-00000.bin")  # it has been fetched: not needed again
    again = open_dataset(config_of("memory://bucket/set", cache=CacheConfig(folder=str(tmp_path / "cache"))))
    assert (again.training_rows(every).tokens == local.training_rows(every).tokens).all()


def test_copies_keep_to_their_budget_and_are_fetched_again(folder: Path, store, tmp_path: Path) -> None:
    upload(store, folder)
    largest = max(p.stat().st_size for p in folder.glob("*.bin"))
    config = config_of(
        "memory://bucket/set", cache=CacheConfig(folder=str(tmp_path / "cache"), gib=3.5 * largest / 2**30)
    )
    dataset = open_dataset(config)
    local = open_dataset(config_of(folder)).training_rows(np.arange(200)).labels
    assert (dataset.training_rows(np.arange(200)).labels == local).all()
    copies = [p for p in (tmp_path / "cache").rglob("*") if p.suffix in (".bin", ".idx")]
    assert sum(p.stat().st_size for p in copies) <= 3.5 * largest
    assert len(copies) < 6
    assert (open_dataset(config).training_rows(np.arange(200)).labels == local).all()


class Flaky:
    """A file system whose reads fail, or end early, the first times."""

    def __init__(self, system: fsspec.AbstractFileSystem, failures: int) -> None:
        self._system, self.failures = system, failures

    def open(self, path: str, mode: str) -> object:
        if self.failures > 0:
            self.failures -= 1
            if self.failures % 2:
                raise ConnectionError("connection reset")
            import io

            return io.BytesIO(self._system.cat(path)[:-7])
        return self._system.open(path, mode)


@pytest.mark.parametrize(("failures", "works"), [(3, True), (9, False)])
def test_transfers_that_fail_are_tried_again(folder: Path, store, tmp_path: Path, failures: int, works: bool) -> None:
    upload(store, folder)
    pauses: list[float] = []
    config = CacheConfig(folder=str(tmp_path / "cache"), retries=4)
    remote = RemoteFolder("memory://bucket/set", config, Activity(), sleep=pauses.append)
    remote._system = Flaky(store, failures)
    facts = read_manifest(folder).sources["a"].splits["train"][1].files["bin"]
    if works:
        assert remote.local(f"{SHARD}.bin", facts).read_bytes() == (folder / f"{SHARD}.bin").read_bytes()
        assert pauses == [1, 2, 4]
    else:
        with pytest.raises(DataError, match=f"memory://bucket/set/{SHARD}.bin cannot be fetched after 5 attempts"):
            remote.local(f"{SHARD}.bin", facts)
        assert pauses == [1, 2, 4, 8]
    assert not list((tmp_path / "cache").rglob("*fetching*"))


def test_a_damaged_or_missing_remote_file_is_named_and_not_stored(folder: Path, store, tmp_path: Path) -> None:
    upload(store, folder)
    store.pipe(f"/bucket/set/{SHARD}.bin", (folder / f"{SHARD}.bin").read_bytes()[:-1] + b"\x09")
    store.rm("/bucket/set/a.train-00002.bin")
    remote = RemoteFolder("memory://bucket/set", CacheConfig(folder=str(tmp_path / "cache")), Activity())
    entries = read_manifest(folder).sources["a"].splits["train"]
    with pytest.raises(DataError, match=f"memory://bucket/set/{SHARD}.bin does not match its checksum"):
        remote.local(f"{SHARD}.bin", entries[1].files["bin"])
    with pytest.raises(DataError, match=r"a.train-00002.bin does not exist"):
        remote.local("a.train-00002.bin", entries[2].files["bin"])
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix == ".bin"]


def test_a_fetch_that_was_killed_leaves_nothing_that_counts(folder: Path, store, tmp_path: Path) -> None:
    upload(store, folder)
    facts = read_manifest(folder).sources["a"].splits["train"][1].files["bin"]
    remote = RemoteFolder("memory://bucket/set", CacheConfig(folder=str(tmp_path / "cache")), Activity())
    other = remote.local("a.train-00000.bin", read_manifest(folder).sources["a"].splits["train"][0].files["bin"])
    left = other.with_name(f"{SHARD}.bin.fetching-elsewhere-999999")
    left.write_bytes(b"half")
    ledger = tmp_path / "cache" / LEDGER
    listed = json.loads(ledger.read_text())
    listed["fetching"][str(left.relative_to(tmp_path / "cache"))] = "gone/file.bin"
    ledger.write_text(json.dumps(listed))
    assert remote.local(f"{SHARD}.bin", facts).stat().st_size == facts.bytes
    assert not left.exists()


def test_eviction_removes_only_what_the_cache_wrote(folder: Path, store, tmp_path: Path) -> None:
    """cache.folder is a folder with prepared data and a model of the user in it; the budget holds one shard."""
    upload(store, folder)
    root = tmp_path / "runs"
    others = [root / "data" / "mine" / f"0000{n}.train.{kind}" for n in range(3) for kind in ("bin", "idx", "origins")]
    others += [root / "export" / "pytorch_model.bin", root / "x" / "y" / "a.bin.fetching-1"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious" * 100)
        os.utime(path, (1, 1))
    small = config_of("memory://bucket/set", cache=CacheConfig(folder=str(root), gib=1e-6))
    with pytest.raises(DataError, match=r"data\.cache\.gib=1e-06 is less than one shard: shard a\.train-0000\d"):
        open_dataset(small)
    config = replace(small, cache=CacheConfig(folder=str(root), gib=2e-6))
    dataset = open_dataset(config)
    local = open_dataset(config_of(folder)).training_rows(np.arange(200)).labels
    assert (dataset.training_rows(np.arange(200)).labels == local).all()
    assert all(path.read_bytes() == b"precious" * 100 for path in others)
    listed = json.loads((root / LEDGER).read_text())["copies"]
    there = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".bin", ".idx")} - {
        str(p.relative_to(root)) for p in others
    }
    assert there == set(listed)
    (root / LEDGER).write_text("[")  # an unreadable ledger vouches for nothing, and for nothing's removal
    assert (open_dataset(config).training_rows(np.arange(200)).labels == local).all()
    assert all(path.exists() for path in others)


def test_data_prepared_again_behind_the_same_url_is_not_read_from_old_copies(
    folder: Path, store, tmp_path: Path
) -> None:
    """Every file keeps its size; one process still reads the old data while another opens the new."""
    upload(store, folder)
    config = config_of("memory://bucket/set", cache=CacheConfig(folder=str(tmp_path / "cache")))
    every = np.arange(200)
    before = open_dataset(config)
    old = before.training_rows(every).labels
    other = [np.where(d > 0, d % 299 + 1, 0) for d in random_documents(90, seed=1)]
    write_folder(tmp_path / "new", {"a": [other[:30], other[30:60], other[60:]]})
    assert {p.name: p.stat().st_size for p in folder.glob("*.bin")} == {
        p.name: p.stat().st_size for p in (tmp_path / "new").glob("*.bin")
    }
    store.rm("/bucket/set", recursive=True)
    upload(store, tmp_path / "new")
    after = open_dataset(config)
    assert after.manifest_hash != before.manifest_hash
    new = after.training_rows(every).labels
    assert (new == open_dataset(config_of(tmp_path / "new")).training_rows(every).labels).all() and (new != old).any()
    assert (before.training_rows(every).labels == old).all()


def test_a_copy_damaged_on_the_local_disk_is_fetched_again(folder: Path, store, tmp_path: Path, caplog) -> None:
    upload(store, folder)
    config = config_of("memory://bucket/set", cache=CacheConfig(folder=str(tmp_path / "cache")))
    every = np.arange(200)
    right = open_dataset(config).training_rows(every).labels
    for copy in (tmp_path / "cache").rglob("*.bin"):
        content = copy.read_bytes()
        copy.write_bytes(bytes(4) + content[4:])  # the same size
    assert (open_dataset(config).training_rows(every).labels == right).all()
    assert "changed or damaged after it was fetched. It is fetched again" in caplog.text


def test_one_corrupted_transfer_is_fetched_again(folder: Path, store, tmp_path: Path) -> None:
    upload(store, folder)
    remote = RemoteFolder(
        "memory://bucket/set", CacheConfig(folder=str(tmp_path / "c"), retries=0), Activity(), sleep=id
    )  # type: ignore[arg-type]
    facts = read_manifest(folder).sources["a"].splits["train"][1].files["bin"]
    right = store.cat(f"/bucket/set/{SHARD}.bin")
    opened: list[str] = []

    class Noisy:
        def open(self, path: str, mode: str) -> object:
            opened.append(path)
            return io.BytesIO(right if len(opened) > 1 else right[:-1] + b"?")

    remote._system = Noisy()
    assert remote.local(f"{SHARD}.bin", facts).read_bytes() == right and len(opened) == 2


def test_verifier_survives_a_damaged_note(folder: Path) -> None:
    (folder / VERIFIED).write_text("{")
    Verifier(folder, mode="auto")
    open_dataset(config_of(folder))
    assert json.loads((folder / VERIFIED).read_text())
