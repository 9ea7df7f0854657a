"""Rows: full, every token a label exactly once, documents whole where they can be, and the same to a model as alone."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from shards import random_documents, write_folder
from tiny import engine_of, one_document_rows, recipe_with

from data.batch import Batch
from data.dataset import open_dataset
from data.rows.fim import CROPPED_TOKENS, Fim, build_fim
from data.rows.packing import Piece, best_fit
from recipes.schema.data import DataConfig, FimConfig, SourceConfig
from recipes.schema.errors import DataError

ROW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One source of three shards, 160 documents of 2 to 40 tokens, so documents and rows cross shards."""
    path = tmp_path_factory.mktemp("packed")
    documents = random_documents(160, seed=0)
    write_folder(path, {"a": [documents[:50], documents[50:51], documents[51:]]})
    return path


def config_of(folder: Path, **changes: object) -> DataConfig:
    fields = {"folder": str(folder), "sources": {"a": SourceConfig(path="-")}, "row_tokens": ROW} | changes
    return DataConfig(**fields)  # type: ignore[arg-type]


@st.composite
def stretches(draw: st.DrawFn) -> tuple[list[Piece], int, int]:
    row, rows = draw(st.integers(1, 30)), draw(st.integers(1, 12))
    cuts = draw(st.sets(st.integers(1, row * rows), max_size=40))
    bounds = sorted({0, row * rows} | {c for c in cuts if c < row * rows})
    return [Piece(a, b) for a, b in itertools.pairwise(bounds)], rows, row


@given(stretches())
def test_best_fit_fills_every_row_and_keeps_every_token_once(stretch: tuple[list[Piece], int, int]) -> None:
    documents, rows, row_tokens = stretch
    packed = best_fit(documents, rows=rows, row_tokens=row_tokens)
    assert [sum(p.stop - p.start for p in pieces) for pieces in packed] == [row_tokens] * rows
    places = sorted((p.start, p.stop) for pieces in packed for p in pieces)
    assert places[0][0] == 0 and places[-1][1] == rows * row_tokens
    assert all(a[1] == b[0] for a, b in itertools.pairwise(places))


def test_best_fit_cuts_few_documents() -> None:
    """Lengths as in web text (log-normal, mean about 800): 2,048-token chunks cut a third, best fit little more than it must."""
    rng = np.random.default_rng(0)
    cut = {"chunk": 0, "best_fit": 0, "longer than a row": 0}
    documents = 0
    for _ in range(10):
        bounds = [0]
        while bounds[-1] < 64 * 2048:
            bounds.append(min(64 * 2048, bounds[-1] + int(np.clip(rng.lognormal(6.1, 1.1), 8, 60_000))))
        pieces = [Piece(a, b) for a, b in itertools.pairwise(bounds)]
        whole = set(pieces)
        packed = {p for row in best_fit(pieces, rows=64, row_tokens=2048) for p in row}
        documents += len(pieces)
        cut["best_fit"] += len(whole - packed)
        cut["chunk"] += sum((p.start // 2048) != ((p.stop - 1) // 2048) for p in pieces)
        cut["longer than a row"] += sum(p.stop - p.start > 2048 for p in pieces)
    assert 0.28 < cut["chunk"] / documents < 0.4
    assert cut["best_fit"] < 1.6 * cut["longer than a row"] and cut["best_fit"] < 0.4 * cut["chunk"]


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_every_token_is_a_label_once_and_its_input_is_the_token_before(folder: Path, packing: str) -> None:
    documents = random_documents(160, seed=0)
    stream = np.concatenate(documents)
    dataset = open_dataset(config_of(folder, packing=packing, reset_at_documents=True))
    rows = dataset.train[0]
    batch = dataset.training_rows(np.arange(rows.count))
    assert rows.count == len(stream) // ROW and rows.cropped_tokens == len(stream) % ROW
    labels = np.zeros(len(stream), dtype=int)
    for position in range(rows.count):
        slot = 0
        at = dataset.locate(position)
        assert not at.epoch
        for number, piece in enumerate(at.pieces):
            size = piece.stop - piece.start
            here = slice(slot, slot + size)
            before = 0 if piece.start == 0 else stream[piece.start - 1]
            assert batch.labels[position, here].tolist() == stream[piece.start : piece.stop].tolist()
            assert batch.tokens[position, here].tolist() == [before, *stream[piece.start : piece.stop - 1]]
            assert batch.document_index is not None
            assert (batch.document_index[position, here] == number).all()
            labels[piece.start : piece.stop] += 1
            slot += size
        assert slot == ROW
    assert (labels[: rows.count * ROW] == 1).all() and not labels[rows.count * ROW :].any()


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_rows_of_a_document_are_those_that_hold_it(folder: Path, packing: str) -> None:
    rows = open_dataset(config_of(folder, packing=packing)).train[0]
    for document in (0, 49, 50, 51, 100, 159):
        start, stop = rows.stream.document_span(document)
        held = [r for r in range(rows.count) if any(p.start < stop and start < p.stop for p in rows.pieces(r))]
        assert rows.rows_of(start, stop) == held


def logits(rank: int, batches: list[Batch]) -> list[torch.Tensor]:
    from train.engine import run_schedule
    from train.objective.next_token import local_rows

    found = []
    for batch in batches:
        size = len(batch.tokens), batch.tokens.shape[1]
        recipe = recipe_with(**{
            "model.vocab": 304, "data.reset_at_documents": True, "data.row_tokens": size[1], "run.global_rows": size[0],
            "run.microbatch_rows": size[0],
        })  # fmt: skip
        with engine_of(recipe, rank=rank, world=1) as engine:

            def step(iterator: object, model: torch.nn.Module, engine: object = engine) -> object:
                rows = local_rows(next(iterator), engine.mesh, reset_at_documents=True)  # type: ignore
                out = model(rows.tokens, rows.positions, None, labels=rows.labels, packed_seq_params=rows.context)
                return out, lambda losses: (losses.sum(), losses.detach().clone())

            with torch.no_grad():
                found.append(run_schedule(engine, [batch], forward_step=step, forward_only=True)[0])
    return found


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_a_packed_row_means_to_a_hybrid_what_its_documents_mean_alone(folder: Path, packing: str) -> None:
    """Loss of every label (a function of its logits) in a row of documents = in a separate row that begins with it."""
    dataset = open_dataset(config_of(folder, packing=packing, reset_at_documents=True, row_tokens=64))
    places = [p for p in range(12) if len(dataset.locate(p).pieces) > 2][:2]
    packed = dataset.training_rows(np.array(places))
    alone_tokens, alone_labels, spans = [], [], []
    for row, place in enumerate(places):
        slot = 0
        for piece in dataset.locate(place).pieces:
            size = piece.stop - piece.start
            for many, one in ((alone_tokens, packed.tokens), (alone_labels, packed.labels)):
                many.append(torch.cat([one[row, slot : slot + size], torch.zeros(64 - size, dtype=torch.int64)]))
            spans.append((row, slot, size))
            slot += size
    alone = one_document_rows(torch.stack(alone_tokens), torch.stack(alone_labels))
    [(together, single)] = run_ranks(1, logits, [packed, alone])
    for number, (row, slot, size) in enumerate(spans):
        torch.testing.assert_close(together[row, slot : slot + size], single[number, :size], atol=2e-5, rtol=0)


FIM = Fim(FimConfig(rate=1.0, spm_rate=0.5), prefix=297, suffix=298, middle=299, eod=0)


@given(st.lists(st.integers(1, 290), min_size=8, max_size=60), st.integers(0, 2**64 - 1), st.booleans())
def test_fill_in_the_middle_keeps_a_documents_tokens(body: list[int], key: int, is_whole: bool) -> None:
    labels = np.array(body + [0] * is_whole)
    shown = FIM.rearrange(labels, key=key).tolist()
    assert len(shown) == len(labels)
    assert not is_whole or shown.pop() == 0
    at = {mark: shown.index(mark) for mark in (297, 298, 299)}
    assert at[297] == 0
    if at[298] == 1:  # suffix, prefix, middle
        suffix, rest = shown[2 : at[299]], shown[at[299] + 1 :]
        assert rest + suffix == body[CROPPED_TOKENS:]
    else:
        prefix, suffix, middle = shown[1 : at[298]], shown[at[298] + 1 : at[299]], shown[at[299] + 1 :]
        assert prefix + middle + suffix == body[CROPPED_TOKENS:]


def test_fill_in_the_middle_in_rows(folder: Path) -> None:
    plain = open_dataset(config_of(folder, row_tokens=64))
    half = Fim(FimConfig(rate=0.5), prefix=297, suffix=298, middle=299, eod=0)
    dataset = replace(plain, fim=half)
    count = plain.train[0].count
    before, after = plain.training_rows(np.arange(count)), dataset.training_rows(np.arange(count))
    again, next_epoch = dataset.training_rows(np.arange(3)), dataset.training_rows(np.arange(count, 2 * count))
    assert torch.equal(again.labels, after.labels[:3])
    rearranged = documents = 0
    for position in range(count):
        slot = 0
        for piece in plain.locate(position).pieces:
            stop = slot + piece.stop - piece.start
            one, other = before.labels[position, slot:stop], after.labels[position, slot:stop]
            assert after.tokens[position, slot] == before.tokens[position, slot]
            assert torch.equal(after.tokens[position, slot + 1 : stop], other[:-1])
            documents += len(one) >= 8
            rearranged += not torch.equal(one, other)
            slot = stop
    assert 0.4 < rearranged / documents < 0.6
    key = {p: plain.locate(p).row for p in range(2 * count)}
    same = [
        torch.equal(after.labels[p], next_epoch.labels[q - count])
        for p in range(count)
        for q in range(count, 2 * count)
        if key[p] == key[q]
    ]
    assert len(same) == count and np.mean(same) < 0.3
    with pytest.raises(DataError, match=r"data.fim.prefix='<\|fim_prefix\|>' is not a special token of the tokenizer"):
        build_fim(FimConfig(rate=0.1), special={"<|endoftext|>": 0}, eod=0)
