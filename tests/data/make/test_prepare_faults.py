"""Faults that real files caused: one test for each."""

import bz2
import json
import lzma
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from prepared_files import documents_of
from rich.console import Console

from data.dataset import open_dataset
from data.make import corpus, folder_plan
from data.make.lock import LOCK, prepare_lock
from data.make.megatron_sets import describe_set
from data.prepare import prepare
from data.sources import files
from data.sources.files import ReadError, find_files
from data.store.manifest import read_manifest
from data.store.shards import ShardWriter
from data.tokenizer import hf, load_tokenizer
from recipes.schema.credentials import with_credentials, without_credentials
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError

QUIET = Console(quiet=True)
WORDS = "the quick brown fox jumps over the lazy dog and runs away from all those documents"


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config_of(tmp_path: Path, folder: str = "out", **paths: Path) -> DataConfig:
    return DataConfig(
        folder=str(tmp_path / folder),
        sources={name: SourceConfig(path=str(path)) for name, path in paths.items()},
        tokenizer=TokenizerConfig(vocab_size=270),
        row_tokens=16,
        heldout_fraction=0.1,
        workers=1,
    )


def texts_of(config: DataConfig, split: str) -> dict[str, set[str]]:
    folder, found = Path(config.folder), {}
    tokenizer = load_tokenizer(folder / "tokenizer.json", config.tokenizer)
    for name, source in read_manifest(folder).sources.items():
        pieces = (piece for entry in source.splits[split] for piece in documents_of(folder, entry))
        found[name] = {tokenizer.decode(piece) for piece in pieces}
    return found


def said_by(config: DataConfig) -> str:
    prepare(config, console=Console(file=(said := StringIO()), width=1000))
    return said.getvalue()


def test_a_text_that_one_source_holds_out_is_held_out_of_all(tmp_path: Path) -> None:
    """Each source begins with texts from the middle of another."""
    texts = [f"{n} {WORDS} {n * n}" for n in range(40)]
    config = config_of(
        tmp_path,
        b=jsonl(tmp_path / "b.jsonl", texts),
        a=jsonl(tmp_path / "a.jsonl", [*texts[20:], *texts[:20]]),
        c=jsonl(tmp_path / "c.jsonl", [texts[1], texts[21], *texts[30:]]),
    )
    prepare(config, console=QUIET)
    held, trained = texts_of(config, "heldout"), texts_of(config, "train")
    assert all(held.values()) and all(trained.values())
    assert not set.union(*held.values()) & set.union(*trained.values())


def test_hidden_files_are_left_out_and_reported(tmp_path: Path) -> None:
    jsonl(tmp_path / "in" / "a.jsonl", [f"{n} {WORDS}" for n in range(9)])
    (tmp_path / "in" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "in" / ".cache" / "huggingface" / "a.metadata").write_text("junk")
    (tmp_path / "in" / ".a.jsonl.swp").write_text("junk")
    config = config_of(tmp_path, a=tmp_path / "in")
    assert "a: left out 2 files and folders whose names begin with a dot" in said_by(config)
    assert sum(len(found["a"]) for found in (texts_of(config, "train"), texts_of(config, "heldout"))) == 9


@pytest.mark.parametrize("name", ["part-00000", "a.jsonl~", "a.bak", "a.jsonl.old", "_SUCCESS", "a.gz"])
def test_a_name_that_tells_no_kind_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text\n")
    with pytest.raises(DataError, match=rf"{name} \(data\.sources\.x\).*Set data\.sources\.x\.format \(text"):
        list(corpus.documents("x", SourceConfig(path=str(tmp_path / name))))


def test_kinds_by_other_names_and_tables(tmp_path: Path) -> None:
    texts = [f'{n}, "quoted"\n{WORDS}' for n in range(5)]
    plain = jsonl(tmp_path / "a.JSONL", texts).read_bytes()
    (tmp_path / "a.jsonlines").write_bytes(plain)
    (tmp_path / "a.jsonl.XZ").write_bytes(lzma.compress(plain))
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(plain)
    (tmp_path / "a.jsonl.zstd").write_bytes(sink.getvalue().to_pybytes())
    rows = "\r\n".join(f'{n},"{text.replace(chr(34), chr(34) * 2)}"' for n, text in enumerate(texts))
    (tmp_path / "a.csv").write_text("\ufeffid,text\r\n" + rows, newline="")
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "\n".join(f"{n}\tt{n}" for n in range(5)))
    for name in ("a.JSONL", "a.jsonlines", "a.jsonl.XZ", "a.jsonl.zstd", "a.csv"):
        found = corpus.documents("x", SourceConfig(path=str(tmp_path / name)))
        assert [document.text for document in found] == texts, name
    assert [d.text for d in corpus.documents("x", SourceConfig(path=str(tmp_path / "a.tsv")))] == [
        f"t{n}" for n in range(5)
    ]
    with pytest.raises(DataError, match=r"a\.csv has no column 'body' \(it has: id, text\)"):
        list(corpus.documents("x", SourceConfig(path=str(tmp_path / "a.csv"), text_field="body")))
    (tmp_path / "a.csv").write_text("id,text\n1,a\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"a\.csv row 1 .* cannot be read as a table: .* convert it to UTF-8"):
        list(corpus.documents("x", SourceConfig(path=str(tmp_path / "a.csv"))))
    (tmp_path / "a.csv").write_text("id,text\n1,a\n2\n")
    with pytest.raises(DataError, match=r"a\.csv row 2 has 1 fields, but the first line names 2"):
        list(corpus.documents("x", SourceConfig(path=str(tmp_path / "a.csv"))))


@pytest.mark.parametrize(("suffix", "pack", "padding"), [("bz2", bz2.compress, b""), ("xz", lzma.compress, bytes(8))])
def test_later_members_are_read_and_damaged_ones_named(tmp_path: Path, suffix: str, pack, padding: bytes) -> None:
    one, two = (json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two"))
    path = tmp_path / f"a.jsonl.{suffix}"
    source = SourceConfig(path=str(path))
    path.write_bytes(pack(one) + padding + pack(two))
    assert [document.text for document in corpus.documents("x", source)] == ["one", "two"]
    for damaged in (b"??" + pack(two)[2:], pack(two)[:-6]):
        path.write_bytes(pack(one) + padding + damaged)
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} cannot be read"):
            list(corpus.documents("x", source))


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
def test_an_empty_packed_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl.{suffix}").touch()
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} is 0 bytes long"):
        list(corpus.documents("x", SourceConfig(path=str(tmp_path / f"a.jsonl.{suffix}"))))


def test_each_real_file_is_read_once_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "in" / "deep" / "a.jsonl", ["a"])
    jsonl(tmp_path / "elsewhere" / "b.jsonl", ["b"])
    (tmp_path / "in" / "deep" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "in", tmp_path / "in" / "**" / "*.jsonl"):
        found = [Path(file.name).name for file in find_files("x", str(path))]
        assert sorted(found) == ["a.jsonl", "b.jsonl"], path
    monkeypatch.setattr(files.os, "access", lambda folder, mode: Path(folder).name != "deep")  # root may read all
    with pytest.raises(DataError, match=r"deep cannot be read"):
        find_files("x", str(tmp_path / "in" / "**" / "*.jsonl"))
    real = os.scandir

    def scandir(folder: str) -> object:
        if str(folder).endswith("deep"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(files.os, "scandir", scandir)
    with pytest.raises(DataError, match=r"deep cannot be read: Permission denied"):
        find_files("x", str(tmp_path / "in"))


def test_following_the_advice_keeps_finished_shards(tmp_path: Path) -> None:
    jsonl(tmp_path / "in" / "a.jsonl", [f"{n} {WORDS}" for n in range(20)])
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "good"}\n{oops\n')
    config = replace(config_of(tmp_path, a=tmp_path / "in"), shard_bytes=100)
    with pytest.raises(DataError, match=r"b\.jsonl:2 is not JSON.*on_bad_record=skip"):
        prepare(config, console=QUIET)
    done = {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*.train.bin")}
    assert done
    source = replace(config.sources["a"], on_bad_record="skip", max_expansion=300, max_record_bytes=1 << 30)
    again = replace(config, sources={"a": source})
    manifest = prepare(again, console=QUIET)
    assert manifest is not None and manifest.sources["a"].bad_records == 1
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    with pytest.raises(DataError, match=r"on_bad_record changed"):
        prepare(config, console=QUIET)  # what was left out is not to be called complete


def test_a_replaced_tokenizer_and_edited_files_are_noticed(tmp_path: Path) -> None:
    texts = [f"{n} {WORDS}" for n in range(20)]
    path = tmp_path / "own.json"
    hf.train(texts * 3, TokenizerConfig(vocab_size=270)).save(path)
    config = config_of(tmp_path, a=jsonl(tmp_path / "a.jsonl", texts))
    config = replace(config, tokenizer=TokenizerConfig(path=str(path)))
    prepare(config, console=QUIET)
    assert "changed" not in said_by(config)
    before = (tmp_path / "a.jsonl").stat().st_mtime_ns
    content = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(content.replace("lazy", "busy"))
    os.utime(tmp_path / "a.jsonl", ns=(before + 10**9, before + 10**9))
    assert f"a: files of {tmp_path}/a.jsonl were changed" in said_by(config)
    hf.train(texts * 3, TokenizerConfig(vocab_size=269)).save(path)
    with pytest.raises(DataError, match=r"prepared differently \(tokenizer\.sha256 changed\)"):
        prepare(config, console=QUIET)
    path.unlink()
    assert "up to date" in said_by(config)  # prepared data has its own copy


def test_a_set_on_disk_that_grew_is_noticed(tmp_path: Path) -> None:
    import datasets

    def save(count: int) -> None:
        datasets.Dataset.from_dict({"text": [f"{n} {WORDS}" for n in range(count)]}).to_parquet(
            tmp_path / "set" / "a.parquet"
        )

    (tmp_path / "set").mkdir()
    save(20)
    config = config_of(tmp_path, a=Path("-"))
    config = replace(config, sources={"a": SourceConfig(path=f"hf:{tmp_path / 'set'}")})
    prepare(config, console=QUIET)
    save(30)
    assert f"the set hf:{tmp_path}/set changed since it was prepared. The prepared data is not changed" in said_by(
        config
    )


def test_a_set_of_the_hub_that_grew_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its revision; here that of the newest copy in the cache of `datasets`, laid out as that library does."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def download(count: int, revision: str) -> None:
        rows = datasets.Dataset.from_dict({"text": [f"{n} {WORDS}" for n in range(count)]})
        rows.to_parquet(tmp_path / "set" / "a.parquet")
        loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "elsewhere"))
        copy = tmp_path / "cache" / "me___set" / "default" / "0.0.0" / revision
        copy.parent.mkdir(parents=True, exist_ok=True)
        Path(loaded["train"].cache_files[0]["filename"]).parent.rename(copy)

    download(20, "a" * 40)
    config = replace(config_of(tmp_path, a=Path("-")), sources={"a": SourceConfig(path="hf:me/set")})
    prepare(config, console=QUIET)
    unfinished = replace(config, folder=str(tmp_path / "unfinished"))
    prepare(unfinished, console=QUIET, task="plan")
    assert "changed" not in said_by(config)
    download(30, "b" * 40)
    assert "a: the set hf:me/set changed since it was prepared. The prepared data is not changed" in said_by(config)
    with pytest.raises(
        DataError, match=r"the set hf:me/set \(data\.sources\.a\) changed while .*unfinished was being prepared"
    ):
        prepare(unfinished, console=QUIET)
    prepare(replace(config, folder=str(tmp_path / "new")), console=QUIET)
    assert read_manifest(tmp_path / "new").sources["a"].count("train", "documents") > 20


def test_the_order_of_sources_in_the_recipe_does_not_change_the_data(tmp_path: Path) -> None:
    paths = {name: jsonl(tmp_path / f"{name}.jsonl", [f"{name} {n} {WORDS}" for n in range(30)]) for name in "bca"}
    config = config_of(tmp_path, **paths)
    prepare(config, console=QUIET)
    other = replace(config, sources=dict(sorted(config.sources.items(), reverse=True)))
    one, two = (open_dataset(c).training_rows(np.arange(60)) for c in (config, other))
    assert (one.tokens == two.tokens).all() and (one.source == two.source).all()


def test_documents_held_out_stay_held_out_when_the_set_grows(tmp_path: Path) -> None:
    tokenizer = load_tokenizer_of(tmp_path)
    held = []
    for count in (100, 160):
        with ShardWriter(tmp_path / "set", vocab_size=270) as writer:
            for n in range(count):
                writer.add([1 + n % 200, 0])
            writer.finish()
        splits = describe_set(str(tmp_path / "set"), tokenizer, fraction=0.1, is_first=True, report=lambda *_: None)
        held.append(range(splits["heldout"].first_document, splits["heldout"].documents))
        assert splits["train"].first_document == len(held[-1])
    assert set(held[0]) <= set(held[1])
    lines = "".join(f"{n}\n" for n in range(50))
    first = corpus.cut_in_two("x", lines, fraction=0.1)[1]
    assert first and corpus.cut_in_two("x", lines + lines, fraction=0.1)[1].startswith(first)


def load_tokenizer_of(tmp_path: Path):
    hf.train([WORDS * 40], TokenizerConfig(vocab_size=270)).save(tmp_path / "tokenizer.json")
    return load_tokenizer(tmp_path / "tokenizer.json", TokenizerConfig())


def test_a_request_that_fails_once_while_planning_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "a.jsonl", [f"{n} {WORDS}" for n in range(20)])
    real, calls = folder_plan.cut, []

    def failing(*given: object, **named: object) -> object:
        calls.append(given)
        if len(calls) == 1:
            raise ReadError("memory://x cannot be read: 500")
        return real(f"{given[0]}", SourceConfig(path=str(tmp_path / "a.jsonl")), 1 << 20)

    monkeypatch.setattr(folder_plan, "cut", failing)
    monkeypatch.setattr(files, "_FIRST_WAIT_S", 0.0)
    config = replace(config_of(tmp_path, a=Path("-")), sources={"a": SourceConfig(path="memory://a.jsonl")})
    folder_plan.plan_folder(config, tmp_path)
    assert len(calls) == 2


def test_credentials_are_written_nowhere(tmp_path: Path) -> None:
    import fsspec

    jsonl(tmp_path / "a.jsonl", [f"{n} {WORDS}" for n in range(20)])
    fsspec.filesystem("memory").pipe("/t/a.jsonl?token=s3cret", (tmp_path / "a.jsonl").read_bytes())
    config = config_of(tmp_path, a=Path("-"))
    config = replace(config, sources={"a": SourceConfig(path="memory://t/a.jsonl?token=s3cret")})
    said = said_by(config)
    assert "up to date" in said_by(config)
    written = b"".join(path.read_bytes() for path in Path(config.folder).rglob("*") if path.is_file())
    assert b"s3cret" not in written and b"token=***" in written and "s3cret" not in said
    gone = replace(
        config, folder=str(tmp_path / "x"), sources={"a": SourceConfig(path="memory://gone.jsonl?token=s3cret")}
    )
    with pytest.raises(DataError) as caught:
        prepare(gone, console=QUIET)
    assert "s3cret" not in str(caught.value) and "gone.jsonl" in str(caught.value)
    for url in ("ftp://me:pw@host/a/b.txt", "https://host/a?X-Amz-Signature=abc&part=2", "s3://key:secret@bucket/x"):
        shown = without_credentials(url)
        assert not any(word in shown for word in ("pw", "abc", "secret", "me:"))
        assert with_credentials(shown, url) == url


def test_a_second_prepare_of_a_folder_waits_for_the_first_and_names_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, a=jsonl(tmp_path / "a.jsonl", [f"{n} {WORDS}" for n in range(20)]))
    Path(config.folder).mkdir()
    (Path(config.folder) / "x.bin.writing-gone-1").write_text("left by a kill")
    program = (
        "import sys, time; from pathlib import Path; from data.make.lock import prepare_lock\n"
        "with prepare_lock(Path(sys.argv[1]), is_shared=False, say=print):\n"
        "    print('held', flush=True); time.sleep(1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, config.folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        said = said_by(config)
    assert f"{config.folder} is being prepared by process {other.pid} on {os.uname().nodename}. Waiting" in said
    assert not list(Path(config.folder).glob("*writing*")) and not (Path(config.folder) / LOCK).exists()
    with prepare_lock(tmp_path, is_shared=True, say=print), prepare_lock(tmp_path, is_shared=True, say=pytest.fail):
        pass  # tasks of an array job do not wait for each other


def test_the_token_that_begins_documents(tmp_path: Path) -> None:
    """Written before every document, put before a prompt, said where a tokenizer's own template has one that is not written."""
    import tokenizers

    texts = [f"{n} {WORDS}" for n in range(20)]
    library = hf.train(texts * 3, TokenizerConfig(vocab_size=270, special_tokens={"<bos>": 1}))._library
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    library.save(str(tmp_path / "own.json"))
    config = config_of(tmp_path, a=jsonl(tmp_path / "a.jsonl", texts))
    config = replace(config, tokenizer=TokenizerConfig(path=str(tmp_path / "own.json"), begin_of_document="<bos>"))
    prepare(config, console=QUIET)
    dataset = open_dataset(config)
    assert dataset.tokenizer.prompt("the") == [1, *dataset.tokenizer.encode("the")] and dataset.tokenizer.note is None
    assert dataset.tokenizer.template_begin == "<bos>"
    ends = tokenizers.processors.TemplateProcessing(single="$A <bos>", special_tokens=[("<bos>", 1)])
    library.post_processor = ends
    library.save(str(tmp_path / "ends.json"))
    assert hf.load(tmp_path / "ends.json", (tmp_path / "ends.json").read_bytes()).template_begin is None
    for split in ("train", "heldout"):
        for entry in read_manifest(Path(config.folder)).sources["a"].splits[split]:
            pieces = documents_of(Path(config.folder), entry)
            assert all(piece[0] == 1 and piece[-1] == 0 and (piece == 1).sum() == 1 for piece in pieces)
    without = replace(config, tokenizer=replace(config.tokenizer, begin_of_document=None))
    with pytest.raises(DataError, match=r"begin with <bos>, but data\.tokenizer\.begin_of_document=null"):
        open_dataset(without)
    said = said_by(replace(without, folder=str(tmp_path / "none")))
    assert "template puts '<bos>' before a text" in said and "set data.tokenizer.begin_of_document='<bos>'" in said


def test_remedies_fit_the_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size=100 is less than the 256 bytes.*Use 257 or more"):
        hf.train([WORDS], TokenizerConfig(vocab_size=100))
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"bytes"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has bytes under 'text', not text: cast the column from binary to string"):
        list(corpus.documents("x", SourceConfig(path=str(tmp_path / "a.parquet"))))
    (tmp_path / "a.jsonl").write_text('{"text": ["a", "b"]}\n')
    with pytest.raises(DataError, match=r"has list under 'text', but a template takes text and numbers"):
        list(corpus.documents("x", SourceConfig(path=str(tmp_path / "a.jsonl"), template="{text}!")))
    config = config_of(tmp_path, a=jsonl(tmp_path / "b.jsonl", [f"{n} {WORDS}" for n in range(12)]))
    prepare(config, console=QUIET)
    with pytest.raises(DataError, match=r"the train part .* or add text\.\n"):
        open_dataset(replace(config, row_tokens=10**6))
    index = Path(config.folder) / "a" / "00000.train.idx"
    header_sequences = int.from_bytes(index.read_bytes()[18:26], "little")
    index.write_bytes(index.read_bytes() + bytes(header_sequences))
    from data.store.shards import read_header

    with pytest.raises(DataError, match=r"is the index of a multimodal set"):
        read_header(index)
