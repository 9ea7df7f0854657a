"""Preparing: the shards contain the input texts, for any number of workers, and bad input loses no data."""

import gzip
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prepared_files import check_digests, documents_of
from rich.console import Console
from texts import config_of

from data.make.corpus import Document, digest, documents, is_heldout
from data.prepare import prepare
from data.store.manifest import read_manifest
from data.store.origins import Origin, read_origins
from data.store.shards import open_shard
from data.stream import open_dataset
from data.tokenizer import load_tokenizer
from recipes.schema.data import DataConfig, PhaseConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError
from recipes.schema.typed import build

QUIET = Console(quiet=True)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def documents_by_split(config: DataConfig, name: str) -> dict[str, list[Document]]:
    """Documents by split, by the rule as docs/data.md states it."""
    found: dict[str, list[Document]] = {"train": [], "heldout": []}
    sure: dict[str, str] = {}
    for document in documents(name, config.sources[name]):
        known = digest(document.text.encode(), seed=config.seed)
        if len(sure) < 2 and known not in sure:
            sure[known] = ("heldout", "train")[len(sure)]
        by_hash = "heldout" if is_heldout(known, fraction=config.heldout_fraction) else "train"
        found[sure.get(known, by_hash)].append(document)
    return found


def test_shards_hold_every_document_and_decode_to_it(prepared: DataConfig) -> None:
    folder = Path(prepared.folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json", prepared.tokenizer)
    manifest = read_manifest(folder)
    check_digests(folder, manifest)
    for name in prepared.sources:
        wanted = documents_by_split(prepared, name)
        assert wanted["train"] and wanted["heldout"]
        for split, found in wanted.items():
            (entry,) = manifest.sources[name].splits[split]
            pieces = documents_of(folder, entry)
            assert all(piece[-1] == tokenizer.eod for piece in pieces)
            assert [tokenizer.decode(piece) for piece in pieces] == [d.text for d in found]
            assert entry.documents == len(found)
            assert entry.tokens == sum(map(len, pieces))
            assert entry.text_bytes == sum(len(d.text.encode()) for d in found)
            assert tokenizer.token_bytes()[np.concatenate(pieces)].sum() == entry.text_bytes
            origins = read_origins(folder, entry)
            assert [origins.of(i) for i in range(len(found))] == [Origin(d.file, d.record) for d in found]


def test_megatron_reads_our_shards_and_we_read_megatrons(prepared: DataConfig, tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = Path(prepared.folder) / "verse/00000.train"
    ours = open_shard(prefix)
    theirs = IndexedDataset(str(prefix))
    pieces = np.split(np.asarray(ours.tokens), ours.ends[:-1])
    assert len(theirs) == len(pieces) and list(theirs.document_indices) == list(range(len(pieces) + 1))
    assert all(np.array_equal(theirs[i], piece) for i, piece in enumerate(pieces))

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    documents = [[[1, 2, 3], [4]], [[70000, 5]]]  # the first document in two sentences
    for document in documents:
        for sentence in document:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    read = open_shard(tmp_path / "m")
    assert read.tokens.tolist() == [1, 2, 3, 4, 70000, 5] and read.ends.tolist() == [4, 6]


def test_output_does_not_depend_on_workers_and_is_made_once(prepared: DataConfig, texts: Path) -> None:
    first = digests(Path(prepared.folder))
    other = config_of(texts, folder=str(texts / "again"), workers=3)
    prepare(other, console=QUIET)
    assert digests(Path(other.folder)) == first
    stamp = (Path(other.folder) / "verse/00000.train.bin").stat().st_mtime_ns
    prepare(other, console=QUIET)
    assert (Path(other.folder) / "verse/00000.train.bin").stat().st_mtime_ns == stamp


def test_unfinished_work_is_continued_to_the_same_result(prepared: DataConfig, texts: Path) -> None:
    """As after a kill: the manifest is missing, one source is done, the other half-written."""
    folder = Path(prepared.folder)
    whole = digests(folder)
    (folder / "manifest.json").unlink()
    (folder / "code/00000.json").unlink()
    (folder / "code/00000.train.bin").rename(folder / "code/00000.train.bin.writing-elsewhere-17")
    prepare(prepared, console=QUIET)
    again = digests(folder)
    assert {name: again[name] for name in whole} == whole


def test_another_request_does_not_touch_what_is_there(prepared: DataConfig) -> None:
    before = digests(Path(prepared.folder))
    other = replace(prepared, tokenizer=TokenizerConfig(vocab_size=290))
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size changed.*Nothing was overwritten"):
        prepare(other, console=QUIET)
    assert digests(Path(prepared.folder)) == before


def test_each_source_may_hold_out_its_own_share_or_all(prepared: DataConfig, texts: Path) -> None:
    sources = {
        "verse": replace(prepared.sources["verse"], heldout_fraction=0.5),
        "code": prepared.sources["code"],
        "probe": SourceConfig(path=str(texts / "code.jsonl"), text_field="content", weight=0, heldout_fraction=1),
    }
    config = config_of(texts, folder=str(texts / "own"), sources=sources)
    manifest = prepare(config, console=QUIET)
    assert manifest is not None
    assert manifest.request["sources"]["verse"]["heldout_fraction"] == 0.5  # recorded, where it is not the data set's
    assert "heldout_fraction" not in manifest.request["sources"]["code"] and manifest.request["heldout_fraction"] == 0.2
    count = {
        name: [entry.count(s, "documents") for s in ("train", "heldout")] for name, entry in manifest.sources.items()
    }
    at_half = documents_by_split(replace(config, heldout_fraction=0.5), "verse")
    assert count["verse"] == [len(at_half["train"]), len(at_half["heldout"])] and count["verse"][1] > 2
    as_before = read_manifest(Path(prepared.folder)).sources["code"]
    assert count["code"] == [as_before.count(split, "documents") for split in ("train", "heldout")]
    assert count["probe"] == [0, 180]
    dataset = open_dataset(config)
    assert dataset.heldout_count("probe") > 0 and dataset.train[1].count == 0
    assert set(dataset.training_rows(np.arange(200)).source.tolist()) == {0, 2}
    with pytest.raises(DataError, match=r"sources\.verse\.heldout_fraction changed"):
        prepare(replace(config, sources=sources | {"verse": prepared.sources["verse"]}), console=QUIET)
    drawn = replace(config, sources=sources | {"probe": replace(sources["probe"], weight=0.1)})
    with pytest.raises(DataError, match=r"probe.heldout_fraction=1 .* but data.sources.probe.weight=0.1 draws from it"):
        open_dataset(drawn)
    with pytest.raises(DataError, match=r"heldout_fraction=1 .* but data.phases\[0\].weights.probe=2 draws"):
        prepare(
            replace(config, folder=str(texts / "x"), phases=(PhaseConfig(100, {"verse": 1, "probe": 2}),)),
            console=QUIET,
        )


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "all"])
def test_impossible_held_out_shares_are_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.a\.heldout_fraction"):
        build(DataConfig, {"sources": {"a": {"path": "x", "heldout_fraction": value}}}, "data")


def source(texts: Path, path: str, **fields: object) -> DataConfig:
    return config_of(texts, sources={"bad": SourceConfig(path=str(texts / path), **fields)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("gone.txt", None, {}, "no file there"),
        ("empty.txt", b"", {}, "contains no text"),
        ("latin.txt", "naïve".encode("latin-1"), {}, r"latin\.txt .* not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', {}, r"bad\.jsonl:2 is not JSON"),
        ("field.jsonl", b'{"body": "a"}\n', {}, r"field\.jsonl:1 has no text under 'text' \(it has: body\)"),
        ("cut.txt.gz", gzip.compress(b"hello world\n" * 100, mtime=0)[:-20], {}, r"cut\.txt\.gz cannot be read"),
        ("junk.parquet", b"PAR1junk", {}, r"junk\.parquet \(data\.sources\.bad\) cannot be read as parquet"),
        ("line.txt", b"only one line", {}, "single line"),
    ],
)
def test_bad_sources_are_named(texts: Path, name: str, content: bytes | None, fields: dict, message: str) -> None:
    if content is not None:
        (texts / name).write_bytes(content)
    config = source(texts, name, **fields)
    with pytest.raises(DataError, match=message):
        prepare(config, console=QUIET)
    assert not (Path(config.folder) / "manifest.json").exists()


def test_too_little_text_for_the_vocabulary(texts: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size=4000.*only give \d+ tokens"):
        prepare(config_of(texts, tokenizer=TokenizerConfig(vocab_size=4000)), console=QUIET)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "index", "other tokenizer"])
def test_damaged_shards_are_named_before_the_model_sees_them(prepared: DataConfig, damage: str) -> None:
    folder = Path(prepared.folder)
    shard = folder / "verse/00000.train.bin"
    content = shard.read_bytes()
    match damage:
        case "truncate":
            shard.write_bytes(content[:-2])
        case "flip":
            shard.write_bytes(content[:100] + b"\xff\xff" + content[102:])  # id 65,535: beyond any vocabulary here
        case "remove":
            shard.unlink()
        case "index":
            index = folder / "verse/00000.train.idx"
            index.write_bytes(b"x" * index.stat().st_size)
        case "other tokenizer":
            path = folder / "tokenizer.json"
            path.write_text(path.read_text().replace('"Ġ', '"ġ', 1))
    with pytest.raises(DataError, match=r"verse/00000\.train|tokenizer\.json|vocabulary"):
        dataset = open_dataset(prepared)
        for position in range(0, 400, 50):
            dataset.training_rows(np.arange(position, position + 50))
    if damage == "flip":
        with pytest.raises(DataError, match=r"verse/00000\.train\.bin does not match its checksum"):
            open_dataset(replace(prepared, verify="always"))


def test_rows_longer_than_the_text_are_refused(prepared: DataConfig) -> None:
    with pytest.raises(DataError, match=r"fewer than one row of data\.row_tokens=100000"):
        open_dataset(replace(prepared, row_tokens=100_000))


def test_compressed_and_columnar_files_give_the_same_documents(texts: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    plain = texts / "code.jsonl"
    with gzip.open(texts / "code.gz.jsonl.gz", "wb") as stream:
        stream.write(plain.read_bytes())
    import json

    rows = [json.loads(line)["content"] for line in plain.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"content": rows}), texts / "code.parquet")
    for name in ("code.gz.jsonl.gz", "code.parquet"):
        found = documents("x", SourceConfig(path=str(texts / name), text_field="content"))
        assert [d.text for d in found] == rows


def test_shipped_and_standard_library_sources_are_there() -> None:
    play = next(documents("x", SourceConfig(path="package:shakespeare")))
    assert "HAMLET" in play.text
    code = list(documents("x", SourceConfig(path="python-stdlib", max_bytes=100_000)))
    assert 100_000 <= sum(len(d.text.encode()) for d in code) < 1_000_000
    with pytest.raises(DataError, match="Use one of shakespeare"):
        list(documents("x", SourceConfig(path="package:milton")))


def test_folder_that_cannot_be_written(texts: Path) -> None:
    (texts / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot write"):
        prepare(config_of(texts, folder=str(texts / "file" / "x")), console=QUIET)
    shutil.rmtree(texts / "verse")
