"""Rows of preferences made by hand: answers to the same context side by side, of two or more ranks, with padding."""

from collections.abc import Sequence

import numpy as np
import torch

from data.batch import Batch

EOD = 0


def preference_row(answers: Sequence[tuple[Sequence[int], int, int, int]], row_tokens: int) -> dict[str, np.ndarray]:
    """One row. answers: (token ids, how many of its last are learned, group, rank); an unlearned end-of-document token follows
    each, and the row is filled up with them."""
    ids, learned, index = [], [], []
    for document, (tokens, count, _, _) in enumerate(answers):
        size = len(tokens) + 1 if document < len(answers) - 1 else row_tokens - len(ids)
        ids += [*tokens, *[EOD] * (size - len(tokens))]
        learned += [False] * (len(tokens) - count) + [True] * count + [False] * (size - len(tokens))
        index += [document] * size
    assert len(ids) == row_tokens, "the answers do not fit"
    return {
        "labels": np.array(ids),
        "tokens": np.array([EOD, *ids[:-1]]),
        "learned": np.array(learned),
        "document_index": np.array(index, dtype=np.int32),
        "ranks": np.array([rank for *_, rank in answers], dtype=np.int16),
        "groups": np.array([group for _, _, group, _ in answers], dtype=np.int32),
    }


def batch_of(rows: Sequence[dict[str, np.ndarray]], positions: np.ndarray) -> Batch:
    """Rows as a batch; ranks and groups padded with -1."""
    most = max(len(row["ranks"]) for row in rows)

    def stacked(name: str) -> torch.Tensor:
        values = [row[name] for row in rows]
        if name in ("ranks", "groups"):
            values = [np.pad(value, (0, most - len(value)), constant_values=-1) for value in values]
        return torch.from_numpy(np.stack(values))

    names = ("tokens", "labels", "document_index", "learned", "ranks", "groups")
    return Batch(
        **{name: stacked(name) for name in names},
        source=torch.zeros(len(rows), dtype=torch.int32),
        positions=positions,
    )


def drawn_rows(step: int, positions: np.ndarray, *, row_tokens: int = 64, vocab: int = 256) -> Batch:
    """Rows that are a function of step and position: one to three contexts, each with two answers, or four with a tie."""
    return batch_of([_drawn(step, int(position), row_tokens, vocab) for position in positions], positions)


def _drawn(step: int, position: int, row_tokens: int, vocab: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng((step, position))
    answers: list[tuple[Sequence[int], int, int, int]] = []
    for group in range(1 + position % 3):
        ranks = (0, 1, 1, 2) if (step + position + group) % 3 == 0 else (0, 1)
        context = draw.integers(1, vocab, 3).tolist()
        for rank in ranks:
            size = int(draw.integers(1, 4))
            answers.append((context + draw.integers(1, vocab, size).tolist(), size, group, rank))
    return preference_row(answers, row_tokens)
