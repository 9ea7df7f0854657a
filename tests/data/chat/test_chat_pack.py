"""Rows of whole chats: nothing is cut or lost, every row is exactly full, and little of it is filling."""

import numpy as np

from data.chat.encode import ChatDocument
from data.chat.pack import RowPacker, best_fit_whole

ROW, EOD = 100, 9


def chat(number: int, size: int) -> ChatDocument:
    ids = np.full(size, number + 10)
    return ChatDocument(ids, np.arange(size) % 2 == 1, text_bytes=size)


def packed(
    sizes: list[int], *, is_single: bool = False
) -> tuple[list[int], list[ChatDocument], RowPacker[int, ChatDocument]]:
    packer: RowPacker[int, ChatDocument] = RowPacker(ROW, EOD, is_single)
    out = [pair for number, size in enumerate(sizes) for pair in packer.add(number, chat(number, size))]
    out += packer.finish()
    return [label for label, _ in out], [document for _, document in out], packer


def test_chats_come_out_whole_in_full_rows() -> None:
    sizes = np.clip(np.random.default_rng(0).lognormal(3, 0.8, 3000).astype(int), 2, ROW).tolist()
    labels, documents, packer = packed(sizes)
    assert sorted(labels) == list(range(len(sizes)))
    ends = np.cumsum([len(document.ids) for document in documents])
    assert set(range(ROW, ends[-1] + 1, ROW)) <= set(ends.tolist())  # a chat ends where a row ends: none crosses
    for label, document in zip(labels, documents, strict=True):
        size = sizes[label]
        assert (document.ids[:size] == label + 10).all() and (document.ids[size:] == EOD).all()
        assert (document.learned[:size] == chat(label, size).learned).all() and not document.learned[size:].any()
    assert packer.padding == ends[-1] - sum(sizes)
    assert packer.padding < 0.02 * ends[-1]


def test_single_gives_each_chat_a_row() -> None:
    labels, documents, packer = packed([30, 100, 1], is_single=True)
    assert labels == [0, 1, 2] and all(len(document.ids) == ROW for document in documents)
    assert packer.padding == 70 + 99


def test_chats_of_more_than_half_a_row_are_not_held_back_for_ever() -> None:
    labels, documents, _ = packed([60] * 500)
    assert sorted(labels) == list(range(500)) and all(len(document.ids) == ROW for document in documents)


def test_best_fit_by_hand() -> None:
    # 70 opens a row, 50 another; 40 fits only beside 50; 30 fills up the first; 20 opens a third.
    assert best_fit_whole([20, 30, 40, 50, 70], row_tokens=100) == [[0], [1, 4], [2, 3]]
