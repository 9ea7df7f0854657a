"""Compiled reading gives the same ids as the plain form, for every dtype, packing and division into shards."""

import ctypes
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import random_documents, write_folder

import data.rows.batch_memory
from data.batch import Batch
from data.dataset import open_dataset
from data.native import rows as native
from data.rows.fim import Fim, FimConfig
from data.rows.packing import Piece, best_fit
from data.store.manifest import file_facts, read_manifest, write_manifest
from data.store.shards import _CODES, _HEADER, _MAGIC
from recipes.schema.data import DataConfig, SourceConfig

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here: the plain form is all there is")


@st.composite
def stretches(draw: st.DrawFn) -> tuple[list[list[int]], int, list[tuple[int, int]]]:
    """Places where the documents of some entries begin (some hold nothing), row_tokens, (tokens before, rows) of stretches."""
    row = draw(st.sampled_from([1, 2, 7, 16, 60, 300]))
    wanted = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 64)), min_size=1, max_size=6))
    entries = []
    for _ in range(draw(st.integers(1, 3))):
        longest = draw(st.sampled_from([2, row, 3 * row + 1]))
        lengths = draw(st.lists(st.integers(0, longest), max_size=200))
        entries.append(list(itertools.accumulate(lengths, initial=0)))
    return entries, row, wanted


@settings(max_examples=300)
@given(stretches(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 40), st.integers(0, 200))
def test_compiled_packing_is_the_plain_one(
    stretch: tuple[list[list[int]], int, list[tuple[int, int]]], itemsize: int, first: int, guess: int
) -> None:
    """One call for stretches of several entries, of unequal size, some twice; guess: how well the room is guessed."""
    entries, row_tokens, wanted = stretch
    offsets = [(first + itemsize * np.array(starts)).astype("<i8") for starts in entries]
    records = [
        native.ShardRecord(
            first_byte=first, shift=itemsize.bit_length() - 1, documents=len(each), starts=each.ctypes.data
        )
        for each in offsets
    ]
    asked = [
        native.Stretch(ctypes.addressof(records[n % len(entries)]), low, rows, guess)
        for n, (low, rows) in enumerate(wanted)
    ]
    for number, found in enumerate(native.pack(asked, row_tokens=row_tokens)):
        starts, (low, rows) = entries[number % len(entries)], wanted[number]
        high = low + rows * row_tokens
        bounds = [low, *(s for s in starts if low < s < high), high]
        expected = best_fit([Piece(a, b) for a, b in itertools.pairwise(bounds)], rows=rows, row_tokens=row_tokens)
        assert found is not None
        counts, places = np.diff(found[: rows + 1]).tolist(), found[rows + 1 :].reshape(-1, 2)
        pieces = iter([Piece(low + start, low + start + size) for start, size in places.tolist()])
        assert [[next(pieces) for _ in range(count)] for count in counts] == expected
        assert next(pieces, None) is None


def test_an_index_that_goes_back_is_left_to_the_plain_form() -> None:
    offsets, rising = np.array([0, 40, 20, 60], dtype="<i8"), np.array([0, 20, 40], dtype="<i8")
    record = native.ShardRecord(documents=4, starts=offsets.ctypes.data)
    sound = native.ShardRecord(documents=3, starts=rising.ctypes.data)
    asked = [native.Stretch(ctypes.addressof(r), 0, rows, 4) for r, rows in ((record, 4), (sound, 3), (record, 4))]
    found = native.pack(asked, row_tokens=20)
    assert found[0] is found[2] is None and found[1] is not None
    assert found[1].tolist() == [0, 1, 2, 3, 0, 20, 20, 20, 40, 20]


def store_as(folder: Path, dtype: str, *, pieces: int) -> None:
    """Store the shards of source `a` as another dtype, and where `pieces` > 1 documents as several sequences, as Megatron may."""
    manifest = read_manifest(folder)
    source = manifest.sources["a"]
    entries = []
    for entry in source.splits["train"]:
        tokens = np.fromfile(folder / f"{entry.path}.bin", dtype="<u2").astype(dtype)
        tokens.tofile(folder / f"{entry.path}.bin")
        ends = np.flatnonzero(tokens == 0) + 1
        cuts = np.unique(np.concatenate([ends, np.arange(pieces, len(tokens), pieces)])) if pieces > 1 else ends
        starts = np.concatenate([[0], cuts[:-1]])
        with (folder / f"{entry.path}.idx").open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, _CODES[np.dtype(dtype)], len(cuts), len(ends) + 1))
            stream.write(np.diff(cuts, prepend=0).astype("<i4").tobytes())
            stream.write((starts * np.dtype(dtype).itemsize).astype("<i8").tobytes())
            stream.write(np.concatenate([[0], np.searchsorted(cuts, ends) + 1]).astype("<i8").tobytes())
        facts = {suffix: file_facts(folder / f"{entry.path}.{suffix}") for suffix in ("bin", "idx")}
        entries.append(replace(entry, dtype=np.dtype(dtype).name, files=facts))
    source = replace(source, splits=source.splits | {"train": entries})
    write_manifest(folder, replace(manifest, sources={"a": source}))


def every_way(config: DataConfig, monkeypatch: pytest.MonkeyPatch, fim: Fim | None = None) -> list[tuple[Batch, ...]]:
    """Two epochs of rows in batches of 7 and some held-out ones: plain; compiled; compiled, with documents looked up in files."""
    found = []
    for change in (("data.native.rows.library", lambda: None), None, ("data.rows.reader._STARTS_IN_MEMORY", 0)):
        with monkeypatch.context() as patch:
            if change:
                patch.setattr(*change)
            dataset = replace(open_dataset(config), fim=fim)
            last = 2 * dataset.train[0].count
            batches = [dataset.training_rows(np.arange(p, min(p + 7, last))) for p in range(0, last, 7)]
            found.append([*batches, dataset.heldout_rows("a", 0, 3)])
    return list(zip(*found, strict=True))


def same(one: Batch, two: Batch) -> bool:
    documents = one.document_index is two.document_index is None or torch.equal(one.document_index, two.document_index)
    return torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels) and documents


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
@pytest.mark.parametrize(("dtype", "pieces"), [("u1", 1), ("i1", 1), ("<i2", 5), ("<u2", 1), ("<i4", 1), ("<i8", 9)])
def test_the_rows_are_the_same(
    tmp_path: Path, dtype: str, pieces: int, packing: str, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 1,200, 40 and 600 documents and rows of 16 and 50: stretches inside shards, over two and over three."""
    texts = random_documents(1840, seed=3)
    texts = [np.append(text[:-1] % 126 + 1, 0) for text in texts]
    write_folder(tmp_path, {"a": [texts[:1200], texts[1200:1240], texts[1240:]]})
    store_as(tmp_path, dtype, pieces=pieces)
    for row_tokens in (16, 50):
        config = DataConfig(
            folder=str(tmp_path),
            sources={"a": SourceConfig(path="-")},
            row_tokens=row_tokens,
            packing=packing,  # type: ignore[arg-type]
            reset_at_documents=documents,
        )
        assert open_dataset(config).train[0].stream.dtype == np.dtype(dtype)
        for plain, *others in every_way(config, monkeypatch):
            assert plain.tokens.dtype == plain.labels.dtype == torch.int64
            assert (plain.document_index is not None) == documents
            assert all(same(plain, other) for other in others)


def test_the_rows_are_the_same_rearranged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"a": [random_documents(800, seed=4)]})
    fim = Fim(FimConfig(rate=0.5), prefix=297, suffix=298, middle=299, eod=0)
    for packing in ("chunk", "best_fit"):
        config = DataConfig(
            folder=str(tmp_path), sources={"a": SourceConfig(path="-")}, row_tokens=64, packing=packing,  # type: ignore[arg-type]
            reset_at_documents=True,
        )  # fmt: skip
        for plain, *others in every_way(config, monkeypatch, fim):
            assert all(same(plain, other) for other in others)


def test_compiled_code_does_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows except the first of each shard and those that end in the next; otherwise the tests above would compare nothing."""
    write_folder(tmp_path, {"a": [random_documents(400, seed=6), random_documents(300, seed=7)]})
    for packing, rest in (("chunk", 3), ("best_fit", 3 * 64)):
        config = DataConfig(
            folder=str(tmp_path), sources={"a": SourceConfig(path="-")}, row_tokens=32, packing=packing,  # type: ignore[arg-type]
            reset_at_documents=True,
        )  # fmt: skip
        dataset, plain = open_dataset(config), []
        real = data.rows.batch_memory._read_row
        monkeypatch.setattr(
            "data.rows.batch_memory._read_row",
            lambda *a, real=real, plain=plain, **k: (plain.append(a[1]), real(*a, **k)),
        )
        dataset.training_rows(np.arange(dataset.train[0].count))
        monkeypatch.setattr("data.rows.batch_memory._read_row", real)
        assert 0 in plain and len(plain) <= rest


def test_what_is_waited_for_is_named_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call over several shards reports which one it reads; here, at the end of the call, the shard of its last row."""
    write_folder(tmp_path, {"a": [random_documents(200, seed=8), random_documents(200, seed=9)]})
    dataset = open_dataset(DataConfig(folder=str(tmp_path), sources={"a": SourceConfig(path="-")}, row_tokens=32))
    real, plans = native.Plan.read, []
    monkeypatch.setattr(native.Plan, "read", lambda plan, **k: (plans.append(plan), real(plan, **k))[1])
    for position in range(dataset.train[0].count - 1):
        dataset.training_rows(np.array([position, position + 1]))
    named = {str(plan) for plan in plans}
    assert named == {f"reading {tmp_path}/a.train-0000{n}.bin" for n in range(2)}
    assert all(str(plan) == plan.shards[-1].reading for plan in plans)


def test_stored_packings_stay_within_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"a": [random_documents(3000, seed=5)]})
    config = DataConfig(
        folder=str(tmp_path),
        sources={"a": SourceConfig(path="-")},
        row_tokens=32,
        packing="best_fit",
        reset_at_documents=True,
    )
    every = open_dataset(config)
    count = every.train[0].count
    expected = every.training_rows(np.arange(count))
    monkeypatch.setattr("data.rows.packing._CACHE_BYTES", 5000)
    few = open_dataset(config)
    for start in range(0, count, 16):
        batch = few.training_rows(np.arange(start, min(count, start + 16)))
        assert torch.equal(batch.labels, expected.labels[start : start + 16])
    rows = few.train[0]
    kept = rows._stretches._values.values()
    assert rows._stretches.weight == sum(packed.numbers.nbytes for packed in kept) <= 5000
    assert 0 < len(kept) < -(-count // 64)
