"""Reads the rows of a batch into arrays: labels, the token before each label, and its document. Rows may be of several sources.

    read_batch(parts, source, row, ...) -> BatchArrays

Compiled code reads the rows in one call (`data.native.rows`), except rows that span two shards and the first row of a
stream. Python code (`packing.py`, `reader.py`) reads those. If a file changed, ended early or contains invalid ids, Python
reads all rows again and reports the error. Both give the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.native import rows as native
from data.rows.packing import Rows
from data.store.cache import Activity
from recipes.schema.errors import DataError


@dataclass(frozen=True)
class BatchArrays:
    """The rows of a batch, as arrays."""

    tokens: np.ndarray
    """[rows, row_tokens] int64; may be a view of the same memory as `labels`."""
    labels: np.ndarray
    """[rows, row_tokens] int64."""
    documents: np.ndarray | None
    """[rows, row_tokens] int32: which document of the row each label belongs to, from 0."""


def read_batch(
    parts: Sequence[Rows],
    source: np.ndarray,
    row: np.ndarray,
    *,
    vocab_size: int,
    with_documents: bool,
    separate: bool,
    activity: Activity,
) -> BatchArrays:
    """Row row[i] of parts[source[i]], for each i.

    separate: tokens and labels in memory of their own. Otherwise both are views of one array, moved by one token. Best-fit
    rows and fill in the middle need it: there a label is not always the input of the next slot. Raises DataError that names a
    file with wrong content.
    """
    row_tokens, count = parts[0].row_tokens, len(row)
    documents = np.empty((count, row_tokens), dtype=np.int32) if with_documents else None
    if separate:
        tokens, labels = (np.empty((count, row_tokens), dtype=np.int64) for _ in range(2))
        arrays = BatchArrays(tokens, labels, documents)
    else:
        tokens, labels = np.empty((count, row_tokens + 1), dtype=np.int64), None
        arrays = BatchArrays(tokens[:, :-1], tokens[:, 1:], documents)
    sources, rows = source.tolist(), row.tolist()
    remaining: Sequence[int] | None = None
    if native.library() is not None:
        remaining = _read_compiled(
            parts, sources, rows, tokens, labels, documents, vocab_size=vocab_size, activity=activity
        )
    elif not separate:
        remaining = _read_chunks(parts, sources, rows, tokens, documents, vocab_size=vocab_size)
    for place in range(count) if remaining is None else remaining:
        _read_row(parts[sources[place]], rows[place], arrays, place, vocab_size=vocab_size)
    return arrays


def _read_compiled(
    parts: Sequence[Rows],
    sources: list[int],
    rows: list[int],
    tokens: np.ndarray,
    labels: np.ndarray | None,
    documents: np.ndarray | None,
    *,
    vocab_size: int,
    activity: Activity,
) -> list[int] | None:
    """Read the rows that compiled code can read. -> places of the others; None after an error, when no row may be used."""
    plan, remaining = native.Plan(), list[int]()
    if len(distinct := set(sources)) == 1:
        remaining = parts[sources[0]].plan(rows, list(range(len(rows))), plan)
    else:
        for which in distinct:
            here = [place for place, other in enumerate(sources) if other == which]
            remaining += parts[which].plan([rows[place] for place in here], here, plan)
    if plan.shards:
        with activity.of(plan):
            is_good = plan.read(vocab_size=vocab_size, tokens=tokens, labels=labels, documents=documents)
        if not is_good or not all(shard.is_still_at_its_path() for shard in set(plan.shards)):
            return None
    return remaining


def _read_chunks(
    parts: Sequence[Rows],
    sources: list[int],
    rows: list[int],
    tokens: np.ndarray,
    documents: np.ndarray | None,
    *,
    vocab_size: int,
) -> list[int]:
    """Read rows of the plain order without compiled code: all ids as stored, then widened to int64 once.

    -> places of the rows with invalid ids. `_read_row` reads them again and reports the error.
    """
    narrow = np.empty(tokens.shape, dtype=np.result_type(*(part.stream.dtype for part in parts)))
    for which in set(sources):
        here = [place for place, other in enumerate(sources) if other == which]
        parts[which].read_chunks([rows[place] for place in here], narrow, here)
    if not _are_ids(narrow, vocab_size):
        return [place for place in range(len(rows)) if not _are_ids(narrow[place], vocab_size)]
    tokens[:] = narrow
    if documents is not None:
        row_tokens = documents.shape[1]
        for place, which in enumerate(sources):
            last = 0
            for number, slot in enumerate([*parts[which].boundaries(rows[place]), row_tokens]):
                documents[place, last:slot] = number
                last = slot
    return []


def _read_row(part: Rows, row: int, arrays: BatchArrays, place: int, *, vocab_size: int) -> None:
    """Read one row of any packing from any number of shards. DataError for invalid ids."""
    pieces = part.pieces(row)
    inputs, labels = part.assemble(pieces)
    for ids in (inputs, labels):
        if not _are_ids(ids, vocab_size):
            raise _not_ids(ids, part, row, vocab_size)
    arrays.tokens[place], arrays.labels[place] = inputs, labels
    if arrays.documents is not None:
        arrays.documents[place] = np.repeat(np.arange(len(pieces)), [p.stop - p.start for p in pieces])


def _are_ids(ids: np.ndarray, vocab_size: int) -> bool:
    if not ids.size:
        return True
    return int(ids.max()) < vocab_size and (ids.dtype.kind == "u" or int(ids.min()) >= 0)


def _not_ids(ids: np.ndarray, part: Rows, row: int, vocab_size: int) -> DataError:
    worst = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
    start, stream = part.pieces(row)[0].start, part.stream
    which = int(np.searchsorted(stream.shard_starts, start, side="right")) - 1
    return DataError(
        f"{stream.entries[which].path}.bin contains token id {worst:,} in row {row:,}, outside the vocabulary of "
        f"{vocab_size:,}: the shard was replaced or damaged. `stratum inspect -cn RECIPE --verify` checks every "
        f"file. Prepare the data again."
    )
