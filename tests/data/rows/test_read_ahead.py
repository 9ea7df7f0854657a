"""Shards behind a URL, from a real server: fetched before they are needed, within the budget, whole or not at all."""

import contextlib
import http.server
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from shards import random_documents, write_folder

from data.dataset import open_dataset
from data.rows.read_ahead import FetchAhead
from data.store.cache import Activity, RemoteFolder
from data.store.manifest import read_manifest
from data.stream import Stream
from recipes.schema.data import CacheConfig, DataConfig, SourceConfig
from recipes.schema.errors import DataError

SHARDS = 8
ROOT = Path(__file__).resolve().parents[3]
FETCH = """
import sys
from data.store.cache import Activity, RemoteFolder
from recipes.schema.data import CacheConfig
from data.store.manifest import FileFacts
url, folder, name, size, sha256 = sys.argv[1:]
RemoteFolder(url, CacheConfig(folder=folder), Activity()).local(name, FileFacts(int(size), sha256))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of eight shards, 60 rows of 16 tokens in each shard, more or less."""
    path = tmp_path_factory.mktemp("far")
    parts = {name: random_documents(50 * SHARDS, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    write_folder(path, {n: [d[i * 50 : i * 50 + 50] for i in range(SHARDS)] for n, d in parts.items()})
    return path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; a file named in `slow` comes in pieces with pauses, one in `broken` ends early as often as it says."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.fetched: Counter[str] = Counter()
        self.slow: dict[str, float] = {}
        self.broken: Counter[str] = Counter()
        self.sent = threading.Event()


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        name = self.path.rpartition("/")[2]
        self.server.fetched[name] += 1
        content = source.read()
        if self.server.broken[name] > 0:
            self.server.broken[name] -= 1
            outputfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        pause = self.server.slow.get(name, 0)
        size = max(1, len(content) // 4) if pause else len(content)
        for start in range(0, len(content), size):
            outputfile.write(content[start : start + size])
            outputfile.flush()
            self.server.sent.set()
            time.sleep(pause)


@contextmanager
def served(folder: Path) -> Iterator[tuple[Server, str]]:
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def config_of(url: str, cache: Path, *, gib: float = 1.0, **changes: object) -> DataConfig:
    fields: dict[str, object] = {
        "folder": url,
        "sources": {"a": SourceConfig(path="-", weight=0.7), "b": SourceConfig(path="-", weight=0.3)},
        "row_tokens": 16,
        "shuffle_shards": 1,
        "cache": CacheConfig(folder=str(cache), gib=gib),
    }
    return DataConfig(**(fields | changes))  # type: ignore[arg-type]


def is_settled(ahead: FetchAhead, total: int) -> bool:
    """Whether it has fetched everything for the current position."""
    with ahead._lock:
        is_up_to_date = all(need.is_begun and need.last >= ahead.position for need in ahead._needed.values())
        copies = [
            ahead._remote.path_of(f"{need.entry.path}.bin", need.entry.files["bin"]) for need in ahead._needed.values()
        ]
    return is_up_to_date and (ahead._is_full or ahead._examined >= total) and all(copy.exists() for copy in copies)


def wait_for(ask) -> None:
    deadline = time.monotonic() + 20
    while not ask():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def bytes_in(cache: Path) -> int:
    """Bytes of the token files in the cache. Its threads may remove one between the listing and the look at it."""
    size = 0
    for path in cache.rglob("*.bin"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_shards_are_there_before_rows_need_them_within_the_budget(
    folder: Path, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budget for seven of sixteen shards: nearly all are fetched by the threads, before a row asks."""
    monkeypatch.setattr("data.rows.read_ahead._POLL_S", 0.01)
    manifest = read_manifest(folder)
    sizes = {
        f"{e.path}.{suffix}": e.files[suffix].bytes
        for source in manifest.sources.values() for e in source.splits["train"] for suffix in ("bin", "idx")
    }  # fmt: skip
    budget = 7 / 16 * sum(sizes.values())
    cache = tmp_path / "cache"
    with served(folder) as (server, url):
        config = config_of(url, cache, packing=packing, gib=budget / 2**30)
        far, near = open_dataset(config), open_dataset(config_of(str(folder), cache, packing=packing))
        total = near.train[0].count + near.train[0].count * 3 // 7  # an epoch of the one, less or more of the other
        by = Counter[str]()
        assert far.remote is not None
        fetch = far.remote._fetch

        def noted(name: str, path: Path, facts: object) -> None:
            by[threading.current_thread().name.partition("-")[0]] += 1
            fetch(name, path, facts)  # type: ignore[arg-type]

        far.remote._fetch = noted  # type: ignore[method-assign]
        used = []
        with Stream(far, position=0, global_rows=8, microbatch_rows=8, rank=0, ranks=1, prefetch_steps=1) as stream:
            ahead = stream._fetching
            assert ahead is not None
            for step in range(total // 8):
                wait_for(lambda: is_settled(ahead, total))  # a step of training gives it that time
                (batch,) = next(stream)
                assert (batch.labels == near.training_rows(np.arange(step * 8, step * 8 + 8)).labels).all()
                used.append(bytes_in(cache))
        assert max(used) <= budget and by["fetch"] >= 28
        # The first files are raced for. A row at the end of a shard needs the next one too, so shards of 60 rows come twice.
        assert by["rows"] <= (6 if packing == "chunk" else by["fetch"] // 2)
        assert sum(by.values()) <= 2 * sum("train" in name for name in server.fetched)


def test_what_is_needed_next_is_known_from_the_position(folder: Path, tmp_path: Path) -> None:
    """Against a search through every row ahead."""
    with served(folder) as (_, url):
        dataset = open_dataset(config_of(url, tmp_path / "cache"))
        assert dataset.remote is not None
        ahead = FetchAhead(dataset.blend, dataset.train, dataset.remote, position=123, threads=0)
        wanted: list[tuple[int, int]] = []
        for position in range(123, 900):
            row = dataset.locate(position)
            starts = dataset.train[row.source].stream.shard_starts
            for token in (row.pieces[0].start - 1, row.pieces[-1].stop - 1):
                key = row.source, int(np.searchsorted(starts, max(token, 0), side="right")) - 1
                if key not in wanted:
                    wanted.append(key)
        entries = [dataset.train[source].stream.entries[shard] for source, shard in wanted]
        assert [ahead._next() for _ in range(8)] == entries[:8]


def test_a_process_killed_in_the_middle_of_a_fetch_leaves_nothing_that_counts(folder: Path, tmp_path: Path) -> None:
    facts = read_manifest(folder).sources["a"].splits["train"][1].files["bin"]
    name, config = "a.train-00001.bin", CacheConfig(folder=str(tmp_path / "cache"))
    other = read_manifest(folder).sources["a"].splits["train"][2].files["bin"]
    with served(folder) as (server, url):
        for _ in range(2):
            server.slow[name] = 30.0
            server.sent.clear()
            words = [sys.executable, "-c", FETCH, url, config.folder, name, str(facts.bytes), facts.sha256]
            child = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert server.sent.wait(60)
            wait_for(lambda: list((tmp_path / "cache").rglob("*.fetching-*")))
            child.kill()
            child.wait()
            assert not list((tmp_path / "cache").rglob("*.bin"))
        del server.slow[name]
        remote = RemoteFolder(url, config, Activity())
        remote.local("a.train-00002.bin", other)  # another fetch removes what the dead one left
        assert not list((tmp_path / "cache").rglob("*.fetching-*"))
        assert remote.local(name, facts).read_bytes() == (folder / name).read_bytes()


def test_a_transfer_that_breaks_off_is_tried_again_and_one_that_stalls_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(folder) as (server, url):
        config = config_of(url, tmp_path / "cache", sources={"a": SourceConfig(path="-")})
        dataset = open_dataset(config)
        assert dataset.remote is not None
        dataset.remote._sleep = lambda seconds: None
        entries = dataset.train[0].stream.entries
        ahead = FetchAhead(dataset.blend, dataset.train, dataset.remote, position=0, threads=0)
        first, second = ahead._next(), ahead._next()
        assert first in entries and second in entries and first is not None and second is not None
        server.broken[f"{first.path.rpartition('/')[2]}.bin"] = 2
        server.slow[f"{second.path.rpartition('/')[2]}.bin"] = 60.0
        with (
            caplog.at_level(logging.WARNING),
            Stream(
                dataset,
                position=0,
                global_rows=8,
                microbatch_rows=8,
                rank=0,
                ranks=1,
                prefetch_steps=1,
                stall_warning_s=0.3,
                stall_limit_s=5.0,
            ) as stream,
            pytest.raises(DataError, match=rf"waiting for a copy of {url}/{second.path}\.bin \(for \d+ s\)"),
        ):
            for _ in range(100):
                next(stream)
    assert f"{first.path}.bin" in caplog.text and "Attempt 2 of 6 follows" in caplog.text


def test_what_cannot_be_fetched_ahead_is_left_to_the_row_that_needs_it(folder: Path, tmp_path: Path, caplog) -> None:
    with served(folder) as (_, url):
        dataset = open_dataset(config_of(url, tmp_path / "cache"))
        (hidden := folder / "b.train-00003.bin").rename(tmp_path / "away")
        try:
            with Stream(
                dataset, position=0, global_rows=8, microbatch_rows=8, rank=0, ranks=1, prefetch_steps=1
            ) as stream:
                next(stream)
                wait_for(lambda: "b.train-00003.bin does not exist" in caplog.text)
                with pytest.raises(DataError, match=r"b\.train-00003\.bin does not exist"):
                    for _ in range(1000):
                        next(stream)
        finally:
            (tmp_path / "away").rename(hidden)
