"""Untrusted and damaged files: each reader of `data` raises its own error, in bounded time and memory."""

import base64
import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from mutations import check_reader, json_mutants, mutants
from rich.console import Console
from shards import random_documents, write_folder

from data.make.corpus import documents
from data.prepare import prepare
from data.sources.files import expand_braces
from data.store.manifest import read_manifest
from data.store.shards import open_shard
from data.tokenizer import load_tokenizer
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError

TEXTS = [f"text {n}: naïve café 日本, some more words {n * n}\n" for n in range(30)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
TOKENIZER = TokenizerConfig(pattern="gpt2", rank_offset=2, special_tokens={"</s>": 0}, end_of_document="</s>")


def tekken(**changes: object) -> bytes:
    """A tekken file of the 256 bytes and one merge."""
    tokens = [bytes([n]) for n in range(256)] + [b"te"]
    content: dict[str, object] = {
        "config": {"pattern": r"\w+|\W", "default_vocab_size": 260, "default_num_special_tokens": 3},
        "vocab": [{"rank": n, "token_bytes": base64.b64encode(t).decode()} for n, t in enumerate(tokens)],
        "special_tokens": [{"rank": n, "token_str": name} for n, name in enumerate(("<unk>", "<s>", "</s>"))],
    }
    return json.dumps(content | changes).encode()


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small valid file of each kind, by its name."""
    root = tmp_path_factory.mktemp("valid")
    (root / "text").write_text("".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text"), model_prefix=str(root / "p"), vocab_size=60, minloglevel=9
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": TEXTS, "n": list(range(30))}), root / "a.parquet", row_group_size=10
    )
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(root / "set"))
    write_folder(root / "folder", {"a": [random_documents(20, seed=1)]})
    ranks = "".join(f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256))
    return {
        "tekken.json": tekken(),
        "a.tiktoken": ranks.encode(),
        "a.model": (root / "p.model").read_bytes(),
        "a.parquet": (root / "a.parquet").read_bytes(),
        "data-00000-of-00001.arrow": next((root / "set").glob("*.arrow")).read_bytes(),
        "state.json": (root / "set" / "state.json").read_bytes(),
        "dataset_info.json": (root / "set" / "dataset_info.json").read_bytes(),
        "a.jsonl": LINES,
        "a.jsonl.gz": gzip.compress(LINES),
        "a.jsonl.zst": pyarrow.compress(LINES, codec="zstd", asbytes=True),
        "a.jsonl.bz2": bz2.compress(LINES),
        "a.jsonl.xz": lzma.compress(LINES),
        "a.csv": b"text,n\n" + b"".join(b'"some, text",%d\n' % n for n in range(30)),
        **{
            path.name: path.read_bytes() for path in (root / "folder").iterdir()
        },  # tokenizer.json, manifest.json, .idx and .bin
    }


def read_anything(path: Path) -> None:
    """Read a file to its end by the reader of its kind."""
    match path.name:
        case "manifest.json":
            read_manifest(path.parent)
        case name if name.endswith((".idx", ".bin")):
            open_shard(path.with_suffix(""))
        case "tokenizer.json" | "tekken.json" | "a.tiktoken" | "a.model":
            end = "<|endoftext|>" if path.name == "tokenizer.json" else "</s>"
            own = (
                TOKENIZER if path.suffix == ".tiktoken" else TokenizerConfig(end_of_document=end, encoder="tokenizers")
            )
            tokenizer = load_tokenizer(path, own)
            ids = tokenizer.encode_batch(["some text, 10 naïve", ""])
            tokenizer.loss("some text, 10 naïve", ids[0])
            assert tokenizer.decode(ids[0]) is not None and tokenizer.fingerprint and tokenizer.note != ""
        case "data-00000-of-00001.arrow" | "state.json" | "dataset_info.json":
            list(documents("x", SourceConfig(path=str(path.parent), format="dataset")))
        case _:
            list(documents("x", SourceConfig(path=str(path), on_bad_record="skip")))


def variants(valid: dict[str, bytes], *, count: int, seed: int) -> dict[str, Iterator[tuple[str, bytes]]]:
    """`count` variants of the bytes of every file, and as many of the values of JSON files."""
    found: dict[str, Iterator[tuple[str, bytes]]] = {}
    for name, content in valid.items():
        found[name] = mutants(content, count=count, seed=seed)
        if name.endswith(".json"):
            found[name] = chain(found[name], json_mutants(content, count=count, seed=seed))
    return found


def fuzz(valid: dict[str, bytes], folder: Path, *, count: int, seed: int) -> None:
    """Read `count` variants of each file (twice as many of JSON files); the other files of a set or shard are whole."""
    for name, content in valid.items():
        (folder / name).write_bytes(content)
    for name in valid:
        read_anything(folder / name)
    for name, some in variants(valid, count=count, seed=seed).items():
        check_reader(read_anything, {name: some}, folder=folder)
        (folder / name).write_bytes(valid[name])


def test_readers_contain_damaged_files(valid: dict[str, bytes], tmp_path: Path) -> None:
    fuzz(valid, tmp_path, count=4, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_readers_contain_thousands_of_damaged_files(valid: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    fuzz(valid, tmp_path, count=40, seed=seed)


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        read()
    return str(caught.value)


def test_small_tables_that_decode_to_gigabytes(tmp_path: Path) -> None:
    """4,200 rows that repeat one value of 1 MB: a file of some kilobytes, 4.2 GB of text."""
    long = pyarrow.array(["x" * 1_000_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4200, pyarrow.int32()), long)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    said = refusal(lambda: list(documents("x", SourceConfig(path=str(path)))))
    assert "a.parquet expands more than max_expansion=200 times" in said and "Leave it out" in said


def test_text_of_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    good, bad = pyarrow.array([b"one text", b"another text"]), pyarrow.array([b"half \xff\xfe"])
    column = pyarrow.chunked_array([good.cast(pyarrow.string()), bad.view(pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    source = SourceConfig(path=str(tmp_path / "a.parquet"))
    said = refusal(lambda: list(documents("x", source)))
    assert "a.parquet row 3 has a value that cannot be read: 'utf-8' codec" in said and "on_bad_record=skip" in said
    skipped = SourceConfig(path=str(tmp_path / "a.parquet"), on_bad_record="skip")
    assert [document.text for document in documents("x", skipped)] == ["one text", "another text"]


def test_a_library_that_aborts_ends_no_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child that reads a table dies as it does when Arrow aborts: one message that names the file."""
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setattr("data.sources.records.pyarrow.parquet.ParquetFile", lambda *given, **options: os.abort())
    config = DataConfig(folder=str(tmp_path / "out"), sources={"a": SourceConfig(path=str(tmp_path / "a.parquet"))})
    said = refusal(lambda: prepare(config, console=Console(quiet=True)))
    assert (
        "a.parquet (data.sources.a) cannot be read: the library that reads it ended its process (exit status -6" in said
    )
    assert "Make it again, or leave it out." in said


def test_paths_whose_braces_stand_for_too_much() -> None:
    said = refusal(lambda: expand_braces("{a,b}" * 30))
    assert "makes 1,048,576 paths, but must make 1 to 1,000,000" in said
    assert "paths" in refusal(lambda: expand_braces("{0..99999999999999999999}"))
    assert len(expand_braces("{a,b}" * 10)) == 1024


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"default_num_special_tokens": 100_000_000}, "=100000000 is not an integer from 0 to 100,000"),
        ({"default_num_special_tokens": "3"}, "default_num_special_tokens='3' is not an integer"),
        ({"special": [{"rank": 7, "token_str": "</s>"}]}, "special token '</s>' has the id 7 of an ordinary token"),
        ({"special": [{"rank": 2**40, "token_str": "</s>"}]}, "token of id 1099511627776, but ids are integers"),
    ],
)
def test_tekken_files_that_ask_for_too_much(tmp_path: Path, changes: dict[str, object], wrong: str) -> None:
    content = json.loads(tekken())
    special = changes.pop("special", content["special_tokens"])
    settings = content["config"] | changes
    (tmp_path / "tekken.json").write_bytes(tekken(config=settings, special_tokens=special))
    assert wrong in refusal(lambda: load_tokenizer(tmp_path / "tekken.json", TokenizerConfig(end_of_document="</s>")))


def test_a_special_token_with_the_id_of_another(valid: dict[str, bytes], tmp_path: Path) -> None:
    content = json.loads(valid["tokenizer.json"])
    content["added_tokens"].append(content["added_tokens"][0] | {"content": "<stop>", "id": 70})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    said = refusal(lambda: load_tokenizer(tmp_path / "tokenizer.json", TOKENIZER))
    assert "its added token '<stop>' has the id 70 of the token" in said


def with_parts(valid: dict[str, bytes], path: Path, **parts: object) -> Path:
    """The valid tokenizer.json with other parts."""
    path.write_text(json.dumps(json.loads(valid["tokenizer.json"]) | parts))
    return path


def test_a_pattern_that_takes_too_long_on_a_text(valid: dict[str, bytes], tmp_path: Path) -> None:
    """`tokenizers` ends the search by a panic of its Rust code, which is no Exception."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    path = with_parts(
        valid, tmp_path / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, whole]}
    )
    tokenizer = TokenizerConfig(path=str(path), end_of_document="<|endoftext|>")
    text = "a" * 40 + "!"
    assert "'aaaa" in (said := refusal(lambda: load_tokenizer(path, tokenizer).encode(text))), said
    assert "cannot be cut into tokens: tokenizers gives up" in said
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": each}) + "\n" for each in ("good text", text, "more text")))
    source = SourceConfig(path=str(lines), heldout_fraction=0.0)
    config = DataConfig(folder=str(tmp_path / "out"), tokenizer=tokenizer, sources={"a": source})
    said = refusal(lambda: prepare(config, console=Console(quiet=True)))
    assert "texts.jsonl:2 cannot be cut into tokens" in said and "on_bad_record=skip" in said
    skips = replace(config, sources={"a": replace(source, on_bad_record="skip")})
    prepare(skips, console=Console(quiet=True))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"]["a"]["bad_records"] == 1


def test_a_normaliser_that_writes_gigabytes(valid: dict[str, bytes], tmp_path: Path) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    path = with_parts(valid, tmp_path / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [step] * 9})
    said = refusal(lambda: load_tokenizer(path, TokenizerConfig(end_of_document="<|endoftext|>")))
    assert "its normalizer can make a text 1,000,000,000 times longer; at most 1000 is taken" in said


def test_tokenizer_files_without_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "a.model").symlink_to("/dev/zero")
    for name in ("tokenizer.json", "a.model"):
        assert "no tokenizer at" in refusal(lambda name=name: load_tokenizer(tmp_path / name, TOKENIZER))
    with (tmp_path / "a.tiktoken").open("wb") as stream:
        stream.truncate(1 << 40)  # a hole
    assert "longer than 268,435,456 bytes" in refusal(lambda: load_tokenizer(tmp_path / "a.tiktoken", TOKENIZER))
