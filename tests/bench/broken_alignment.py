"""`python -m tests.bench.broken_alignment FAULT WORDS`: `stratum train WORDS` with a planted fault. The same experiment must then
fail: one that succeeds without what it is about shows nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

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


FAULTS: dict[str, Callable[[Batch], Batch]] = {"whole_chat": whole_chat, "prompt_only": prompt_only}


if __name__ == "__main__":
    fault, read = FAULTS[sys.argv[1]], Dataset.training_rows
    Dataset.training_rows = lambda *words: fault(read(*words))  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
