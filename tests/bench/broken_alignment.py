"""`python -m tests.bench.broken_alignment FAULT WORDS`: `stratum train WORDS` with a planted fault. The same experiment must then
fail: one that succeeds without what it is about shows nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from data.batch import Batch
from data.dataset import Dataset
from train.__main__ import main


def whole_chat(batch: Batch) -> Batch:
    """Learn every token, as without a mask."""
    return replace(batch, learned=None)


def prompt_only(batch: Batch) -> Batch:
    """Learn what the assistant did not write."""
    assert batch.learned is not None
    return replace(batch, learned=~batch.learned & (batch.labels != 0))


def wrong_sign(batch: Batch) -> Batch:
    """Prefer the rejected answer of each pair."""
    assert batch.ranks is not None
    return replace(batch, ranks=torch.where(batch.ranks >= 0, 1 - batch.ranks, batch.ranks))


FAULTS: dict[str, Callable[[Batch], Batch]] = {
    "whole_chat": whole_chat,
    "prompt_only": prompt_only,
    "wrong_sign": wrong_sign,
}
"""Faults of the rows."""


if __name__ == "__main__":
    fault, read = FAULTS[sys.argv[1]], Dataset.training_rows
    Dataset.training_rows = lambda *words: fault(read(*words))  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
