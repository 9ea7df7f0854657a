"""Documents are the same for every compression, division and address of their file; errors name the place."""

import bz2
import contextlib
import gzip
import http.server
import itertools
import json
import lzma
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.make.corpus import Reader, documents
from data.sources.files import ReadError, expand_braces
from data.sources.parts import cut, read
from data.sources.records import Part, lines_before
from data.sources.sets import set_facts
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError

TEXTS = [f"text {n}: naïve café 日本\n" * (n % 5 + 1) for n in range(40)]
LINES = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)).encode()


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def texts_of(source: SourceConfig) -> list[str]:
    return [document.text for document in documents("x", source)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("windows.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("two.jsonl.gz", gzip.compress(LINES[:700]) + gzip.compress(LINES[700:])),
        ("a.jsonl.zst", zst(LINES)),
        ("frames.jsonl.zst", zst(LINES[:700]) + zst(LINES[700:])),  # one frame after the other, as pzstd writes
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
    ],
)
def test_packing_does_not_matter(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts_of(SourceConfig(path=str(tmp_path / name))) == TEXTS
    assert texts_of(SourceConfig(path=f"file://{tmp_path / name}")) == TEXTS


@pytest.mark.parametrize("packed", [gzip.compress(LINES), zst(LINES), bz2.compress(LINES), lzma.compress(LINES)])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_archives_are_named(tmp_path: Path, packed: bytes, damage: str) -> None:
    suffix = {0x1F: "gz", 0x28: "zst", 0x42: "bz2", 0xFD: "xz"}[packed[0]]
    broken = packed[:-9] if damage == "cut" else packed[:40] + bytes(b ^ 255 for b in packed[40:48]) + packed[48:]
    path = tmp_path / f"broken.jsonl.{suffix}"
    path.write_bytes(broken)
    with pytest.raises(DataError, match=rf"broken\.jsonl\.{suffix}"):
        texts_of(SourceConfig(path=str(path)))


@pytest.mark.parametrize("pack", [gzip.compress, zst])
def test_what_a_few_bytes_unfold_to_is_bounded(tmp_path: Path, pack) -> None:
    name = {gzip.compress: "bomb.txt.gz", zst: "bomb.txt.zst"}[pack]
    (tmp_path / name).write_bytes(pack(bytes(100 << 20)))
    source = SourceConfig(path=str(tmp_path / name), max_record_bytes=1 << 40)
    with pytest.raises(DataError, match=r"bomb.* expands more than max_expansion=200 times"):
        texts_of(source)
    (tmp_path / "row.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + bytes(90 << 20) + b'"}'))
    long_line = replace(source, path=str(tmp_path / "row.jsonl.gz"), max_record_bytes=1 << 20)
    with pytest.raises(DataError, match=r"row\.jsonl\.gz(:1 is a line longer than|.*expands)"):
        texts_of(long_line)


def test_memory_and_braces_and_folders() -> None:
    files = fsspec.filesystem("memory")
    for n in range(3):
        files.pipe(f"/corpus/part-{n:03d}.jsonl", LINES)
    files.pipe("/corpus/.hidden.jsonl", b"junk")
    for path in ("memory://corpus", "memory://corpus/*.jsonl", "memory://corpus/part-{000..002}.jsonl"):
        assert texts_of(SourceConfig(path=path)) == TEXTS * 3
    with pytest.raises(DataError, match="no file there"):
        texts_of(SourceConfig(path="memory://nowhere"))
    for braces, many in (
        ("{0..99999999999}", "100,000,000,000"),
        ("{2..1}", "0"),
        ("{0..9999}{0..9999}", "100,000,000"),
    ):
        with pytest.raises(DataError, match=f"makes {many} paths, but must make 1 to 1,000,000"):
            texts_of(SourceConfig(path=f"memory://corpus/part-{braces}.jsonl"))
    with pytest.raises(DataError, match=r"s3:// needs a package that is not installed\. Install it: pip install s3fs"):
        texts_of(SourceConfig(path="s3://bucket/a.jsonl"))
    with pytest.raises(DataError, match="Protocol not known: s4"):
        texts_of(SourceConfig(path="s4://bucket/a.jsonl"))
    assert expand_braces("a{08..10}{x,y}.z") == ["a08x.z", "a08y.z", "a09x.z", "a09y.z", "a10x.z", "a10y.z"]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A real server of a folder, on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "b-00.jsonl").write_bytes(LINES)
    (tmp_path / "b-01.jsonl.zst").write_bytes(zst(LINES))
    with served(tmp_path) as url:
        assert texts_of(SourceConfig(path=f"{url}/a.jsonl.gz")) == TEXTS
        assert texts_of(SourceConfig(path=f"{url}/{{b-00.jsonl,b-01.jsonl.zst}}")) == TEXTS * 2
        with pytest.raises(DataError, match=r"gone\.jsonl: no file there"):
            texts_of(SourceConfig(path=f"{url}/{{a.jsonl.gz,gone.jsonl}}"))
        large = SourceConfig(path=f"{url}/b-00.jsonl")
        parts = [part for group in cut("x", large, 500) for part in group]  # this server gives whole files only
        reader = Reader("x", large)
        assert len(parts) > 3 and [d.text for part in parts for d in reader.documents(part)] == TEXTS
        reader = Reader("x", SourceConfig(path=f"{url}/a.jsonl.gz"))
        ((part,),) = cut("x", reader.source, 1 << 30)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:? (cannot be read|no file there).*Cannot connect"):
        texts_of(reader.source)  # the server is gone
    with pytest.raises(ReadError, match=r"a\.jsonl\.gz cannot be read"):
        list(reader.documents(part))


lines = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=8), min_size=1, max_size=30)


@given(lines=lines, count=st.integers(1, 12), newline_at_end=st.booleans())
def test_a_cut_file_is_the_whole_file(tmp_path_factory, lines: list[str], count: int, newline_at_end: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    rows = [json.dumps({"text": line}, ensure_ascii=False) if line else "" for line in lines]
    content = "\n".join(rows).encode() + (b"\n" if newline_at_end else b"")
    path.write_bytes(content)
    size = len(content)
    bounds = [size * i // count for i in range(count)] + [None]
    source = SourceConfig(path=str(path))
    found = []
    for start, stop in itertools.pairwise(bounds):
        part = Part(file=str(path), kind="jsonl", size=0, file_size=size, start=start or 0, stop=stop)
        records = list(read("x", source, part))
        if records:
            assert lines_before(source, part) == len(found)  # what a message would say
        assert [record.number for record in records] == list(range(len(records)))
        found += [record.text for record in records]
    assert found == (lines if rows[-1] or newline_at_end else lines[:-1])  # a file's end is no empty line


def test_large_files_are_cut_and_small_ones_grouped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES * 4)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "c.jsonl").write_bytes(LINES)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(LINES * 9))
    source = SourceConfig(path=str(tmp_path))
    shards = cut("x", source, len(LINES))
    names = [[Path(part.file).name for part in group] for group in shards]
    assert names == [["a.jsonl"]] * 4 + [["b.jsonl"], ["c.jsonl"], ["d.jsonl.gz"]]
    assert [len(group) for group in cut("x", source, len(LINES) * 10)] == [4]
    reader = Reader("x", source)
    texts = [document.text for group in shards for part in group for document in reader.documents(part)]
    assert texts == TEXTS * 15


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    table = pyarrow.table({"id": range(40), "text": TEXTS, "meta": [{"title": f"t{n}"} for n in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10, compression="zstd")
    source = SourceConfig(path=str(tmp_path / "a.parquet"))
    assert texts_of(source) == TEXTS
    size = (tmp_path / "a.parquet").stat().st_size
    shards = cut("x", source, size // 4)
    assert len(shards) > 1 and shards[0][0].start == 0
    reader = Reader("x", source)
    assert [d.text for (part,) in shards for d in reader.documents(part)] == TEXTS
    templated = replace(source, template="{meta.title}\n{id}")
    assert texts_of(templated)[:2] == ["t0\n0", "t1\n1"]
    with pytest.raises(DataError, match=r"no column 'body' \(it has: id, text, meta\)"):
        texts_of(replace(source, text_field="body"))


def test_a_template_joins_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "A {b}", "n": 3, "deep": {"body": "text"}}\n{"title": "no body"}\n')
    source = SourceConfig(path=str(path), template="{title} {n}: {deep.body} {{x}}", on_bad_record="skip")
    assert texts_of(source) == ["A {b} 3: text {x}"]
    assert texts_of(replace(source, template=None, text_field="deep.body")) == ["text"]
    with pytest.raises(DataError, match=r"a\.jsonl:2 has no text under 'n' \(it has: title\)"):
        texts_of(replace(source, on_bad_record="error"))
    with pytest.raises(DataError, match=r"template='\{oops' cannot be read"):
        texts_of(replace(source, template="{oops"))
    for template, wrong in (
        ("{title:>9}", "more in braces"),
        ("{title!r}", "more in braces"),
        ("{}", "or nothing"),
        ("a", "no field"),
    ):
        with pytest.raises(DataError, match=wrong):
            texts_of(replace(source, template=template))


BAD = [
    (b'{"text": "good"}', None),
    (b"{oops", "is not JSON"),
    (b'{"text": 3}', "has int under 'text', not text"),
    (b'{"text": null}', "has null under 'text', not text"),
    (b'["text"]', "it has: a list"),
    (b'{"text": "\xff"}', "is not UTF-8"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": "' + b"x" * 200 + b'"}', "longer than max_record_bytes=200"),
    (b"[" * 100_000, "longer than"),
    (b'{"text": "last"}', None),
]


@pytest.mark.parametrize("shard_bytes", [1 << 30, 100])
def test_bad_records_are_named_or_counted(tmp_path: Path, shard_bytes: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line, _ in BAD))
    source = SourceConfig(path=str(path), on_bad_record="skip", max_record_bytes=200)
    reader = Reader("mine", source)
    parts = [part for group in cut("x", source, shard_bytes) for part in group]
    texts = [document.text for part in parts for document in reader.documents(part)]
    assert texts == ["good", "last"] and reader.bad_records == len(BAD) - 2
    for number, (line, problem) in enumerate(BAD, start=1):
        if problem is None:
            continue
        path.write_bytes(b'{"text": "ok"}\n' * (number - 1) + line + b"\n")
        strict = Reader("mine", replace(source, on_bad_record="error"))
        with pytest.raises(DataError) as caught:
            for group in cut("x", source, shard_bytes):
                for part in group:
                    list(strict.documents(part))
        assert f"bad.jsonl:{number} " in str(caught.value) and problem in str(caught.value)
        assert "data.sources.mine.on_bad_record=skip" in str(caught.value)


@settings(max_examples=60)
@given(
    content=st.binary(max_size=300),
    suffix=st.sampled_from(["txt", "jsonl", "jsonl.gz", "txt.zst", "xz", "bz2"]),
)
def test_no_file_ends_in_another_error(tmp_path_factory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    path.write_bytes(content)
    for policy in ("error", "skip"):
        with contextlib.suppress(DataError):
            texts_of(SourceConfig(path=str(path), on_bad_record=policy))  # type: ignore[arg-type]


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    source = SourceConfig(path=str(path))
    ((part,),) = cut("x", source, 1 << 30)
    path.write_bytes(LINES * 2)
    with pytest.raises(DataError, match=r"a\.jsonl .*is no longer"):
        list(Reader("x", source).documents(part))


def test_datasets_on_disk_and_streamed(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(40))})
    whole.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    datasets.DatasetDict({"train": whole, "validation": whole.select(range(3))}).save_to_disk(str(tmp_path / "both"))
    (tmp_path / "repository").mkdir()
    for n in range(2):
        half = whole.select(range(20 * n, 20 * n + 20))
        half.to_parquet(str(tmp_path / "repository" / f"train-{n}.parquet"))
    saved = SourceConfig(path=str(tmp_path / "saved"))
    assert texts_of(saved) == TEXTS
    assert texts_of(SourceConfig(path=str(tmp_path / "both"), split="validation")) == TEXTS[:3]
    with pytest.raises(DataError, match=r"no split 'test' \(it has: train, validation\)"):
        set_facts("x", SourceConfig(path=str(tmp_path / "both"), split="test"))
    streamed = SourceConfig(path=f"hf:{tmp_path / 'repository'}", streaming=True, template="{n}: {text}")
    assert texts_of(streamed) == [f"{n}: {text}" for n, text in enumerate(TEXTS)]
    assert set_facts("x", streamed).shards == 2
    reader = Reader("x", saved)
    shards = cut("x", saved, 1500)
    assert len(shards) > 1
    assert [d.text for (part,) in shards for d in reader.documents(part)] == TEXTS
    with pytest.raises(DataError, match=r"no column 'body' \(it has: text, n\)"):
        texts_of(replace(saved, text_field="body"))
    with pytest.raises(DataError, match="cannot be opened"):
        set_facts("x", SourceConfig(path=f"hf:{tmp_path / 'nothing'}"))
    with pytest.raises(DataError, match="streaming is for sets of the Hub"):
        (tmp_path / "a.jsonl").write_bytes(LINES)
        cut("x", SourceConfig(path=str(tmp_path / "a.jsonl"), streaming=True), 1 << 30)
