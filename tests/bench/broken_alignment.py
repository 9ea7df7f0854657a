"""`python -m tests.bench.broken_alignment FAULT WORDS`: `stratum train WORDS` with a planted fault. The same experiment must then
fail: one that succeeds without what it is about shows nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from data.batch import Batch
from data.dataset import Dataset
from train.__main__ import main
from train.align import policy_stream
from train.align.losses.policy import group_advantages


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


def zero_advantages(*words: Any, **options: Any) -> torch.Tensor:
    """No answer is better than another."""
    return torch.zeros_like(group_advantages(*words, **options))


FAULTS: dict[str, Callable[[Batch], Batch]] = {
    "whole_chat": whole_chat,
    "prompt_only": prompt_only,
    "wrong_sign": wrong_sign,
}
"""Faults of the rows."""


if __name__ == "__main__":
    if sys.argv[1] == zero_advantages.__name__:
        policy_stream.group_advantages = zero_advantages
    else:
        fault, read = FAULTS[sys.argv[1]], Dataset.training_rows
        Dataset.training_rows = lambda *words: fault(read(*words))  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
