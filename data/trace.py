"""`stratum trace`: which documents a training step saw, and at which steps a document was seen.

It reads the prepared data and the recipe, because the row at a position is a pure function of the two. From the run's folder, if
there is one, it reads only which rows the run left out (`data.order.left_out`). Steps are counted from 1, as in metrics.jsonl.
"""

import difflib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from omegaconf import DictConfig

from data.dataset import Dataset, RowAt, open_dataset
from data.media.items import NAMES, Item, seen_size
from data.order.left_out import left_out_by_run
from data.rows.packing import Piece, Rows
from recipes.schema.command import section
from recipes.schema.data import DataConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable, printable_lines
from recipes.schema.options import hand_over
from recipes.schema.tools import TraceConfig
from recipes.schema.typed import build


@dataclass(frozen=True)
class SeenMedium:
    """An image, a clip or a frame in a row."""

    kind: str
    slot: int
    """Index of the label that is its first placeholder, in the row."""
    tokens: int
    size: str
    """Patches or log-mel frames, of a frame of a video its time too."""


@dataclass(frozen=True)
class SeenPiece:
    """A document, or part of one, in a row."""

    slot: int
    """Index of its first label in the row."""
    tokens: int
    document: int
    """Its number in the source's training stream."""
    part: str
    """`whole`, or the range of its tokens and their total number."""
    file: str
    record: int
    text: str
    learned: int
    """Tokens of it that are learned."""
    rank: int | None
    """Of an answer of a preference: its rank, 0 for the best."""
    media: tuple[SeenMedium, ...] = ()
    """In the order of their slots."""


def pieces_of(dataset: Dataset, row: RowAt, *, chars: int) -> Iterator[SeenPiece]:
    """The documents of a row, with their origin and text."""
    rows, slot = dataset.train[row.source], 0
    for piece in row.pieces:
        document = rows.stream.document_at(piece.start)
        start, stop = rows.stream.document_span(document)
        origin = dataset.origin(rows.stream, document)
        is_whole = piece.start == start and piece.stop == stop
        size = piece.stop - piece.start
        yield SeenPiece(
            slot=slot,
            tokens=size,
            document=document,
            part="whole" if is_whole else f"tokens {piece.start - start:,}-{piece.stop - start:,} of {stop - start:,}",
            file=origin.file,
            record=origin.record,
            text=_text(dataset, rows, piece, chars) if chars else "",
            learned=size if rows.mask is None else int(rows.mask.read_labels(piece.start, size).sum(dtype=np.int64)),
            rank=int(rows.ranks_of(document, 1)[0, 0]) if rows.has_ranks else None,
            media=() if rows.media is None else tuple(seen(item, slot) for item in rows.media.items_of(document)),
        )
        slot += size


def seen(item: Item, slot: int) -> SeenMedium:
    """An item of a document that begins at a slot of the row."""
    return SeenMedium(NAMES[item.kind], slot + item.slot, item.tokens, seen_size(item))


def documents_of(dataset: Dataset, config: TraceConfig) -> list[tuple[int, int]]:
    """(source, document) of the training documents that the options name. Raises DataError if no document matches."""
    if config.file is None:
        if config.source is None or config.document is None:
            raise DataError(
                "nothing to trace was given. Use --step N, --file NAME [--record N], or --source NAME --document N."
            )
        if config.source not in dataset.source_names:
            raise DataError(
                f"--source {config.source} is not a source of the recipe. Use one of {', '.join(dataset.source_names)}."
            )
        source = dataset.source_names.index(config.source)
        count = dataset.train[source].stream.documents
        if config.document >= count:
            raise DataError(
                f"--document {config.document}: source {config.source!r} has {count:,} training documents, counted from 0. Use a "
                f"lower number."
            )
        return [(source, config.document)]
    found: list[tuple[int, int]] = []
    is_heldout, names = False, set[str]()
    for source, (train, heldout) in enumerate(zip(dataset.train, dataset.heldout, strict=True)):
        if config.source not in (None, dataset.source_names[source]):
            continue
        for document in _matching(dataset, train, config, names):
            found.append((source, document))
        is_heldout |= next(_matching(dataset, heldout, config, names), None) is not None
    if found:
        return found
    if is_heldout:
        raise DataError(f"{config.file}{_record(config)} is held out for evaluation: no step trains on it.")
    near = difflib.get_close_matches(config.file, [*names, *(name.rsplit("/", 1)[-1] for name in names)], n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Files are named like {min(names, default='')}."
    hint = printable(hint, most=300)
    raise DataError(f"no document came from {config.file}{_record(config)}. {hint}")


def trace(config: TraceConfig, composed: DictConfig) -> int:
    """Print what the options name. -> exit status. DataError if there is no such step, file or document."""
    dataset = open_dataset(build(DataConfig, section(composed, "data"), "data"))
    dataset = dataset.without(left_out_by_run(composed.run))
    steps, global_rows = int(composed.run.steps), int(composed.run.global_rows)
    if config.step is not None:
        _show_step(dataset, config, global_rows, steps=steps)
    else:
        for source, document in documents_of(dataset, config):
            _show_document(dataset, config, source, document, steps=steps, global_rows=global_rows)
    return 0


def _show_step(dataset: Dataset, config: TraceConfig, global_rows: int, *, steps: int) -> None:
    assert config.step is not None
    first = (config.step - 1) * global_rows
    count = min(config.rows or global_rows, global_rows)
    if not config.json:
        _say(
            f"step {config.step:,}: rows {first:,} to {first + global_rows - 1:,} of data {dataset.manifest_hash[:12]}"
        )
        if dataset.blend.left_out.ranges:
            _say(f"(counted without the {dataset.blend.left_out.rows:,} rows that the run left out after a spike)")
    for position in range(first, first + count):
        row = dataset.locate(position)
        name = dataset.source_names[row.source]
        pieces = list(pieces_of(dataset, row, chars=config.chars))
        if config.json:
            seen = {"step": config.step, "position": position, "source": name, "row": row.row, "epoch": row.epoch}
            _say_json(seen | {"documents": [asdict(piece) for piece in pieces]})
            continue
        _say(f"\nposition {position:,}: source {name}, row {row.row:,}, epoch {row.epoch + 1}")
        for piece in pieces:
            place = f"{printable(piece.file)} record {piece.record:,}"
            learned = "" if dataset.train[row.source].mask is None else f", {piece.learned:,} learned"
            rank = "" if piece.rank is None else f", rank {piece.rank}"
            document = f"document {piece.document:,}, {piece.part}{learned}{rank}"
            _say(f"  {piece.slot:>6,}  {piece.tokens:>6,} tokens  {place}  ({document})")
            if piece.text:
                _say(f"          {piece.text!r}")
            for medium in piece.media:
                _say(f"  {medium.slot:>6,}  {medium.tokens:>6,} tokens    {medium.kind}, {medium.size}")
    if config.step > steps and not config.json:
        _say(f"\nThe recipe ends at step {steps:,}: this step exists only with a higher run.steps.")
    if count < global_rows and not config.json:
        _say(f"\n({global_rows - count:,} more rows. To see them, leave out --rows)")


def _show_document(
    dataset: Dataset, config: TraceConfig, source: int, document: int, *, steps: int, global_rows: int
) -> None:
    rows, name = dataset.train[source], dataset.source_names[source]
    start, stop = rows.stream.document_span(document)
    origin = dataset.origin(rows.stream, document)
    its_rows = rows.rows_of(start, stop)
    stop_at = steps * global_rows
    seen = sorted((place, row) for row in its_rows for place in dataset.blend.positions_of(source, row, stop=stop_at))
    if config.json:
        places = [{"step": place // global_rows + 1, "position": place, "row": row} for place, row in seen]
        record = {"source": name, "document": document, "file": origin.file, "record": origin.record, "seen": places}
        _say_json(record)
        return
    _say(
        f"{printable(origin.file)} record {origin.record:,}: document {document:,} of source {name}, {stop - start:,} tokens, in "
        f"{len(its_rows):,} row{'s' * (len(its_rows) != 1)} of {rows.row_tokens:,}"
    )
    if config.chars:
        _say(f"  {_text(dataset, rows, Piece(start, stop), config.chars)!r}")
    if not its_rows:
        _say("  after the source's last whole row, so never trained on")
    elif not seen:
        _say(f"  not seen in the recipe's {steps:,} steps")
    for place, row in seen:
        _say(f"  step {place // global_rows + 1:,}  (position {place:,}, row {row:,})")


def _matching(dataset: Dataset, rows: Rows, config: TraceConfig, names: set[str]) -> Iterator[int]:
    """Documents of a stream that were read from `config.file`. Adds the names of all files to `names`."""
    assert config.file is not None
    for which, entry in enumerate(rows.stream.entries):
        origins = dataset.origins(entry)
        for index, file in enumerate(origins.files):
            names.add(file)
            if file != config.file and not file.endswith("/" + config.file.lstrip("/")):
                continue
            for document in range(int(origins.starts[index]), int(origins.starts[index + 1])):
                if config.record is None or int(origins.records[document]) == config.record:
                    yield int(rows.stream.documents_before[which]) + document


def _text(dataset: Dataset, rows: Rows, piece: Piece, chars: int) -> str:
    """The first `chars` characters of a piece's text. Decodes 4 tokens a character at most, as a token may be one byte."""
    tokens = np.empty(min(piece.stop - piece.start, 4 * chars), dtype=rows.stream.dtype)
    rows.stream.read(piece.start, tokens)
    text = dataset.tokenizer.decode(tokens.tolist())
    return text if len(text) <= chars else text[:chars] + "..."


def _record(config: TraceConfig) -> str:
    return "" if config.record is None else f" record {config.record:,}"


def _say(line: str) -> None:
    sys.stdout.write(printable_lines(line) + "\n")


def _say_json(value: dict[str, object]) -> None:
    line = json.dumps(value, ensure_ascii=False)
    # json leaves C1 control characters (0x9b begins an escape code) unless all of the line is ASCII.
    sys.stdout.write((line if line.isprintable() else json.dumps(value)) + "\n")


if __name__ == "__main__":
    hand_over("trace", *sys.argv[1:])
