"""Fills the memory of a batch: labels, the token before each label, and its document, for rows of several sources.

    fill(parts, source, row, ...) -> Filled

Compiled code reads all rows in one call (`data.native.rows`). `packing.py` and `reader.py` read the rows that it leaves out:
those that span two shards, and the first row of a stream. If a file changed, ended early or contains invalid ids, they read
all rows again and report the error. Both ways give the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.native import rows as native
from data.rows.packing import Rows
from data.store.cache import Activity
from recipes.schema.errors import DataError


@dataclass(frozen=True)
class Filled:
    """The rows of a batch."""

    tokens: np.ndarray
    """[rows, row_tokens] int64; may be a view of the same memory as `labels`."""
    labels: np.ndarray
    """[rows, row_tokens] int64."""
    documents: np.ndarray | None
    """[rows, row_tokens] int32: which document of the row each label belongs to, from 0."""


def fill(
    parts: Sequence[Rows],
    source: np.ndarray,
    row: np.ndarray,
    *,
    vocab_size: int,
    with_documents: bool,
    apart: bool,
    activity: Activity,
) -> Filled:
    """Rows row[i] of parts[source[i]]. apart: tokens and labels in separate memory, which best-fit rows always need.

    Raises DataError that names a file with wrong content.
    """
    row_tokens, count = parts[0].row_tokens, len(row)
    documents = np.empty((count, row_tokens), dtype=np.int32) if with_documents else None
    if apart:
        tokens, labels = (np.empty((count, row_tokens), dtype=np.int64) for _ in range(2))
        filled = Filled(tokens, labels, documents)
    else:
        tokens, labels = np.empty((count, row_tokens + 1), dtype=np.int64), None
        filled = Filled(tokens[:, :-1], tokens[:, 1:], documents)
    sources, rows = source.tolist(), row.tolist()
    left: Sequence[int] | None = None
    if native.library() is not None:
        left = _compiled(parts, sources, rows, tokens, labels, documents, vocab_size=vocab_size, activity=activity)
    elif not apart:
        left = _chunks(parts, sources, rows, tokens, documents, vocab_size=vocab_size)
    for place in range(count) if left is None else left:
        _row(parts[sources[place]], rows[place], filled, place, vocab_size=vocab_size)
    return filled


def _compiled(
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
    """Fill the rows that one call can read. -> the places of the others; None after an error: then no row may be used."""
    plan, left = native.Plan(), list[int]()
    if len(distinct := set(sources)) == 1:
        left = parts[sources[0]].plan(rows, list(range(len(rows))), plan)
    else:
        for which in distinct:
            here = [place for place, other in enumerate(sources) if other == which]
            left += parts[which].plan([rows[place] for place in here], here, plan)
    if plan.shards:
        with activity.of(plan):
            is_good = plan.read(vocab_size=vocab_size, tokens=tokens, labels=labels, documents=documents)
        if not is_good or not all(shard.has_its_name() for shard in set(plan.shards)):
            return None
    return left


def _chunks(
    parts: Sequence[Rows],
    sources: list[int],
    rows: list[int],
    tokens: np.ndarray,
    documents: np.ndarray | None,
    *,
    vocab_size: int,
) -> list[int]:
    """All rows of the plain order, read in place and widened once. -> the places of rows with invalid ids."""
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


def _row(part: Rows, row: int, filled: Filled, place: int, *, vocab_size: int) -> None:
    """One row, of any packing, from any number of shards. DataError for invalid ids."""
    pieces = part.pieces(row)
    inputs, labels = part.assemble(pieces)
    for ids in (inputs, labels):
        if not _are_ids(ids, vocab_size):
            raise _not_ids(ids, part, row, vocab_size)
    filled.tokens[place], filled.labels[place] = inputs, labels
    if filled.documents is not None:
        filled.documents[place] = np.repeat(np.arange(len(pieces)), [p.stop - p.start for p in pieces])


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
        f"file; prepare the data again."
    )
