"""Preparing with many processes: the same bytes with any number of workers and tasks, and after any number of kills."""

import gzip
import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prepared_files import check_digests, documents_of
from rich.console import Console

from data.make import megatron_sets
from data.prepare import parse_task, prepare
from data.store.manifest import read_manifest
from data.store.origins import Origin, read_origins
from data.store.shards import open_shard
from data.tokenizer import Tokenizer, load_tokenizer
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError

QUIET = Console(quiet=True)
ROOT = Path(__file__).resolve().parents[3]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A source of one large file and several small ones, some packed, and one of texts: 10 shards and more."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "web").mkdir()
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "naïve",
        "cafés",
        "serve",
        "日本",
        "tea",
    ]
    draw = random.Random(7)

    def line(n: int) -> str:
        return json.dumps({"text": f"{n}: " + " ".join(draw.choices(words, k=draw.randint(1, 60))), "n": n}) + "\n"

    (root / "web" / "a-large.jsonl").write_text("".join(line(n) for n in range(3000)))
    for n in range(4):
        part = "".join(line(n * 1000 + i) for i in range(200)).encode()
        (root / "web" / f"b-{n}.jsonl.gz").write_bytes(gzip.compress(part, mtime=0))
    (root / "books").mkdir()
    for n in range(30):
        (root / "books" / f"{n:02d}.txt").write_text("\n".join(line(n) for _ in range(20)))
    return DataConfig(
        folder=str(root / "whole"),
        sources={"web": SourceConfig(path=str(root / "web")), "books": SourceConfig(path=str(root / "books"))},
        tokenizer=TokenizerConfig(vocab_size=400),
        row_tokens=32,
        heldout_fraction=0.1,
        shard_bytes=60_000,
        workers=1,
    )


@pytest.fixture(scope="module")
def whole(config: DataConfig) -> dict[str, str]:
    """Digests of the folder prepared in one go."""
    prepare(config, console=QUIET)
    return digests(Path(config.folder))


def elsewhere(config: DataConfig, name: str, **changes: object) -> DataConfig:
    return replace(config, folder=str(Path(config.folder).parent / name), **changes)  # type: ignore[arg-type]


def test_every_record_is_in_exactly_one_shard_and_is_found_again(config: DataConfig, whole: dict[str, str]) -> None:
    folder = Path(config.folder)
    manifest = read_manifest(folder)
    check_digests(folder, manifest)
    tokenizer = load_tokenizer(folder / manifest.tokenizer.file, config.tokenizer)
    seen: dict[Origin, str] = {}
    entries = [entry for split in manifest.sources["web"].splits.values() for entry in split]
    assert len(entries) > 15 and any(entry.first_record for entry in entries)
    for entry in entries:
        origins = read_origins(folder, entry)
        for document, ids in enumerate(documents_of(folder, entry)):
            origin = origins.of(document)
            assert origin not in seen
            seen[origin] = tokenizer.decode(ids)
    wanted = {}
    for file in (folder.parent / "web").iterdir():
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for number, line in enumerate(content.splitlines()):
            wanted[Origin(str(file), number)] = json.loads(line)["text"]
    assert seen == wanted
    assert all(e.documents for source in manifest.sources.values() for split in source.splits.values() for e in split)


def test_a_text_is_held_out_wherever_it_comes_from(config: DataConfig, whole: dict[str, str], tmp_path: Path) -> None:
    """The same records in one file of another format, in another order: the same texts are held out."""
    import pyarrow
    import pyarrow.parquet

    def heldout(prepared: DataConfig, name: str) -> set[str]:
        folder = Path(prepared.folder)
        tokenizer = load_tokenizer(folder / "tokenizer.json", prepared.tokenizer)
        found = set()
        for entry in read_manifest(folder).sources[name].splits["heldout"]:
            found |= {tokenizer.decode(ids) for ids in documents_of(folder, entry)}
        return found

    texts = [json.loads(line)["text"] for line in (Path(config.folder).parent / "web" / "a-large.jsonl").open()]
    order = [0, 1, *range(2999, 1, -1)]  # the first two are dealt by place
    pyarrow.parquet.write_table(pyarrow.table({"text": [texts[n] for n in order]}), tmp_path / "all.parquet")
    other = elsewhere(config, "parquet", sources={"same": SourceConfig(path=str(tmp_path / "all.parquet"))})
    prepare(other, console=QUIET)
    assert heldout(other, "same") == heldout(config, "web") & set(texts)


def test_any_number_of_tasks_gives_the_same_bytes(config: DataConfig, whole: dict[str, str]) -> None:
    other = elsewhere(config, "tasks")
    assert prepare(other, console=QUIET, task="plan") is None
    for index in (2, 0):
        prepare(other, console=QUIET, task=f"{index}/3")
    with pytest.raises(DataError, match=r"lacks \d+ of \d+ shards \(the first: books/00001\)"):
        prepare(other, console=QUIET, task="merge")
    assert prepare(other, console=QUIET, task="1/3") is not None  # the last one writes the manifest
    assert digests(Path(other.folder)) == whole
    assert prepare(other, console=QUIET, task="1/3") is not None  # up to date
    Path(other.folder, "manifest.json").unlink()
    assert prepare(other, console=QUIET, task="merge") is not None
    assert digests(Path(other.folder)) == whole


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "all", "1/2/3"])
def test_array_tasks_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="is not a task"):
        parse_task(text)


def test_the_command_itself_on_two_processes(config: DataConfig, whole: dict[str, str], tmp_path: Path) -> None:
    other = elsewhere(config, "command")
    sources = "{" + ", ".join(f"{n}: {{path: {s.path}}}" for n, s in config.sources.items()) + "}"
    command = [
        sys.executable, "-m", "train.stratum", "prepare", "-cn", "smoke", f"data.folder={other.folder}",
        f"data.sources={sources}", "data.tokenizer.vocab_size=400", "data.row_tokens=32", "data.heldout_fraction=0.1",
        "data.shard_bytes=60000", "data.workers=2",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    plan = subprocess.run([*command, "--task=plan"], env=environment, capture_output=True, text=True, check=False)
    assert plan.returncode == 0, plan.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "web: " in done.stderr and "B/s of text" in done.stderr
    assert digests(Path(other.folder)) == whole
    wrong = subprocess.run([*command, "--task=3/3"], env=environment, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --task 3/3 is not a task")


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(count: int, config: DataConfig, whole: dict[str, str]) -> None:
    """kill -9 at random moments, then the same command again: no finished shard is made twice, the bytes are the same.

    Some runs use two processes, of which only the first is killed: the others have to notice.
    """
    draw = random.Random(2026)
    kills, name = 0, 0
    while kills < count:
        name += 1
        other = elsewhere(config, f"killed-{name}", workers=1 + name % 2)
        folder = Path(other.folder)
        finished: dict[Path, int] = {}
        while True:
            child = preparing_process(other)
            deadline = time.monotonic() + draw.uniform(0.0, 0.5 if other.workers == 1 else 2.0)
            killed = False
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                if kills < count and time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    kills, killed = kills + 1, True
                    break
                time.sleep(0.005)
            time.sleep(0.2 if killed and other.workers > 1 else 0)  # the orphans end at their next batch
            assert {path: path.stat().st_mtime_ns for path in finished} == finished
            finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
            if not killed:
                break
        assert digests(folder) == whole


def preparing_process(config: DataConfig) -> int:
    """A child process that prepares. -> its id."""
    child = os.fork()
    if child == 0:
        try:
            prepare(config, console=QUIET)
        finally:
            os._exit(0)
    return child


def test_a_large_compressed_file_continues_after_a_kill(tmp_path: Path) -> None:
    """kill -9 as soon as a shard inside the file is finished: that shard stays, and its texts are not tokenized again."""
    draw = random.Random(3)
    for name in "ab":  # one job for both, as they are small as stored
        lines = [
            json.dumps({"text": f"{n}{name} " + " ".join(draw.choices(["tea", "ale", "wine"], k=30))})
            for n in range(600)
        ]
        lines[::100] = ["{oops"] * 6
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    source = SourceConfig(path=str(tmp_path / "*.gz"), on_bad_record="skip")
    tokenizer = TokenizerConfig(vocab_size=300)
    config = DataConfig(
        folder=str(tmp_path / "whole"),
        sources={"s": source},
        tokenizer=tokenizer,
        shard_bytes=30_000,
        row_tokens=32,
        workers=1,
    )
    manifest = prepare(config, console=QUIET)
    assert manifest is not None and len(manifest.sources["s"].splits["train"]) >= 4
    documents = sum(manifest.sources["s"].count(split, "documents") for split in ("train", "heldout"))
    assert (manifest.sources["s"].bad_records, documents) == (12, 1188)
    folder = tmp_path / "killed"
    other = replace(config, folder=str(folder))
    finished: dict[Path, int] = {}
    for kill in (1, 2):
        child = preparing_process(other)
        while len(list(folder.glob("s/*-*.json"))) < kill:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert finished.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("s/*-*.json")}.items()
        finished = {path: path.stat().st_mtime_ns for path in folder.glob("s/*-*.json")}
    encoded: list[str] = []
    real = Tokenizer.encode_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Tokenizer, "encode_batch", lambda self, texts, **rest: (encoded.extend(texts), real(self, texts, **rest))[1]
        )
        prepare(other, console=QUIET)
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("s/*-*.json")}.items()
    assert 0 < len(encoded) < 1188 - 2 * 250
    assert digests(folder) == digests(tmp_path / "whole")


def test_a_worker_that_dies_is_named(config: DataConfig) -> None:
    """As the kernel kills a process that takes too much memory; finished shards stay."""
    other = elsewhere(config, "dies", workers=2)
    prepare(other, console=QUIET, task="plan")
    child = os.fork()
    if child == 0:
        try:
            prepare(other, console=QUIET)
        except DataError as error:
            (Path(other.folder) / "message").write_text(str(error))
        finally:
            os._exit(0)
    while True:
        workers = subprocess.run(
            ["pgrep", "-P", str(child), "-f", "spawn_main"], capture_output=True, text=True, check=False
        )
        if workers.stdout.split():
            break
        time.sleep(0.01)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    os.waitpid(child, 0)
    message = (Path(other.folder) / "message").read_text()
    assert "ended by itself with exit status -9" in message and "Finished shards are kept" in message


def test_bad_records_are_counted_in_the_manifest(config: DataConfig, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n} of some length"}) if n % 50 else "{oops" for n in range(1000)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n\n")
    bad = SourceConfig(path=str(tmp_path / "bad.jsonl"), on_bad_record="skip")
    other = replace(config, folder=str(tmp_path / "out"), sources={"bad": bad}, shard_bytes=5000)
    output = Console(quiet=False, file=(tmp_path / "said").open("w"), width=300)
    manifest = prepare(other, console=output)
    assert manifest is not None
    source = manifest.sources["bad"]
    assert (source.bad_records, source.empty_documents) == (20, 1)
    assert source.count("train", "documents") + source.count("heldout", "documents") == 980
    output.file.close()
    said = (tmp_path / "said").read_text()
    assert "left out 20 bad records, e.g. " in said and "bad.jsonl:1 is not JSON" in said
    strict = replace(other, folder=str(tmp_path / "strict"), sources={"bad": replace(bad, on_bad_record="error")})
    with pytest.raises(DataError, match=r"bad\.jsonl:1 is not JSON.*on_bad_record=skip"):
        prepare(strict, console=QUIET)


def test_max_bytes_ends_at_the_same_document_in_any_cut(config: DataConfig) -> None:
    web = replace(config.sources["web"], max_bytes=300_000)
    counts = []
    for number, shard_bytes in enumerate((1 << 30, 20_000)):
        other = elsewhere(config, f"max-{number}", sources={"web": web}, shard_bytes=shard_bytes)
        manifest = prepare(other, console=QUIET)
        assert manifest is not None
        entry = manifest.sources["web"]
        counts.append([entry.count(s, w) for s in ("train", "heldout") for w in ("documents", "tokens", "text_bytes")])
        assert 300_000 <= counts[-1][2] + counts[-1][5] < 301_000
    assert counts[0] == counts[1]


def test_existing_megatron_sets_are_read_in_place(config: DataConfig, whole: dict[str, str], tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    ids = np.random.default_rng(0).integers(1, 400, 5000)
    lengths = np.random.default_rng(1).integers(1, 60, 100)
    for name, dtype in (("a", np.int64), ("b", np.uint16), ("c", np.int32)):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        for start, length in zip(np.cumsum(lengths), lengths, strict=True):
            builder.add_item(torch.tensor(ids[start : start + length].tolist()))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    before = digests(tmp_path)
    sets = SourceConfig(path=str(tmp_path / "[abc]"), format="megatron")
    tokenizer = TokenizerConfig(path=f"{config.folder}/tokenizer.json")
    other = elsewhere(config, "megatron", sources={"sets": sets}, tokenizer=tokenizer)
    said = io.StringIO()
    manifest = prepare(other, console=Console(file=said))
    assert manifest is not None
    last = ids[np.cumsum(lengths) + lengths - 1]  # a document of random ids seldom ends with id 0
    assert (
        f"sets: {3 * int((last != 0).sum())} documents do not end with the end-of-document token (id 0)"
        in said.getvalue()
    )
    splits = manifest.sources["sets"].splits
    assert [entry.dtype for entry in splits["train"]] == ["int64", "uint16", "int32"]
    assert [entry.documents for entry in splits["train"]] == [90] * 3
    assert [entry.documents for entry in splits["heldout"]] == [10] * 3
    for split, start in (("train", 10), ("heldout", 0)):
        for entry in splits[split]:
            for n, document in enumerate(documents_of(Path(other.folder), entry), start=start):
                at = int(lengths[: n + 1].sum())
                assert document.tolist() == ids[at : at + lengths[n]].tolist()
            assert read_origins(Path(other.folder), entry).of(3).record == start + 3
    assert digests(tmp_path) == before
    check_digests(Path(other.folder), read_manifest(Path(other.folder)))
    with pytest.raises(DataError, match=r"\.bin contains token id \d+, outside the tokenizer's vocabulary of 300"):
        small = elsewhere(config, "small", tokenizer=TokenizerConfig(vocab_size=300))
        prepare(small, console=QUIET)
        wrong = replace(
            other, folder=f"{small.folder}-sets", tokenizer=TokenizerConfig(path=f"{small.folder}/tokenizer.json")
        )
        prepare(wrong, console=QUIET)
    real, cut = megatron_sets.open_shard, tmp_path / "b.bin"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"b\.bin ends after .* cut short while"):
        patch.setattr(megatron_sets, "open_shard", lambda prefix: (real(prefix), os.truncate(cut, 100))[0])
        megatron_sets.unended_documents(str(tmp_path / "b"), 0)
    with pytest.raises(DataError, match=r"tokenized already\. Set data\.tokenizer\.path"):
        prepare(elsewhere(config, "untrained", sources={"sets": sets}), console=QUIET)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"documents": [0, 2, 4, 9]}, "has documents from sequence 0 to 9, but 4 sequences"),
        ({"documents": [1, 2, 4]}, "has documents from sequence 1 to 4"),
        ({"documents": [0, 2]}, "has documents from sequence 0 to 2"),
        ({"documents": []}, "has documents none"),
        ({"documents": [0, 3, 2, 4]}, "lets document 1 end at sequence 2, before it begins at 3"),
        ({"documents": [0, -1, 4]}, "lets document 0 end at sequence -1, before it begins at 0"),
        ({"lengths": [10, -5, 25, 10]}, r"has a sequence of -5 tokens \(sequence 1\)"),
        ({"offsets": [60, 40, 20, 0]}, "puts sequence 0 at byte 60, but the one before ends at 0"),
        ({"offsets": [0, 20, 41, 60]}, "puts sequence 2 at byte 41, but the one before ends at 40"),
    ],
)
def test_an_index_that_makes_no_sense_is_named(tmp_path: Path, change: dict[str, list[int]], wrong: str) -> None:
    """Four sequences of ten uint16 tokens, as Megatron writes them, one list changed."""
    parts = {"lengths": [10] * 4, "offsets": [0, 20, 40, 60], "documents": [0, 1, 2, 3, 4]}
    np.arange(40, dtype="<u2").tofile(tmp_path / "a.bin")
    for one, is_good in ((parts, True), (parts | {"documents": [0, 0, 3, 4]}, True), (parts | change, False)):
        header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 4, len(one["documents"]))
        lists = (np.array(one[key], dtype="<i4" if key == "lengths" else "<i8").tobytes() for key in parts)
        (tmp_path / "a.idx").write_bytes(header + b"".join(lists))
        if is_good:
            assert len(open_shard(tmp_path / "a").tokens) == 40
        else:
            with pytest.raises(DataError, match=rf"a\.idx {wrong}"):
                open_shard(tmp_path / "a")
