"""`stratum inspect`: counts, lengths, shares, packing, samples of prepared data, and a picture of document lengths."""

import itertools
import sys
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.dataset import Dataset, open_dataset
from data.media.decode import Decoded
from data.media.images import image_of
from data.media.items import AUDIO, seen_size
from data.order.left_out import left_out_by_run
from data.rows.packing import STRETCH_ROWS, Rows, best_fit
from data.store.cache import is_remote
from data.store.manifest import DESCRIBED, SPLITS, read_manifest
from data.store.verify import Verifier
from data.system.console import open_console, progress
from data.system.figure import MUTED, SERIES, canvas
from data.tokenizer import Tokenizer
from recipes.schema import units
from recipes.schema.command import section
from recipes.schema.credentials import without_credentials
from recipes.schema.data import DataConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable
from recipes.schema.options import hand_over
from recipes.schema.tools import InspectConfig
from recipes.schema.typed import build

_MOST_SHARDS = 32
"""Document lengths are read from at most this many shards of a source, evenly spread."""
_THUMBNAILS_A_LINE, _MOST_THUMBNAILS = 8, 64
_MOST_STRETCHES = 16
"""Cut documents are counted in at most this many stretches of a source, evenly spread."""


def lengths_of(rows: Rows) -> np.ndarray:
    """Length in tokens of a source's documents. If it has many shards, of a sample of shards, evenly spread."""
    count = len(rows.stream.entries)
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST_SHARDS)).astype(int))
    return np.concatenate([rows.stream.document_lengths(int(which)) for which in chosen])


def share_cut(rows: Rows, *, packing: str) -> float:
    """Fraction of documents that packing cuts into more than one row, measured on stretches evenly spread over the source."""
    stretches = max(1, rows.count // STRETCH_ROWS)
    size = STRETCH_ROWS * rows.row_tokens
    documents = cut = 0
    for stretch in np.unique(np.linspace(0, stretches - 1, min(stretches, _MOST_STRETCHES)).astype(int)):
        low = int(stretch) * size
        high = min(low + size, rows.count * rows.row_tokens)
        whole = rows.cut(low, high)
        if packing == "best_fit":
            packed = best_fit(whole, rows=(high - low) // rows.row_tokens, row_tokens=rows.row_tokens)
            uncut = set(itertools.chain.from_iterable(packed))
            cut += sum(piece not in uncut for piece in whole)
        else:
            cut += sum(p.start // rows.row_tokens != (p.stop - 1) // rows.row_tokens for p in whole)
        documents += len(whole)
    return cut / documents


def inspect(config: InspectConfig, composed: DictConfig) -> int:
    """Print the tables and draw the picture. -> exit status. DataError if the data cannot be read."""
    data = build(DataConfig, section(composed, "data"), "data")
    console = open_console()
    if config.verify:
        _verify(data, console)
    dataset = open_dataset(data)
    if (left := left_out_by_run(composed.run)).ranges:
        ranges = ", ".join(f"{start:,}-{stop - 1:,}" for start, stop in left.ranges)
        console.print(f"The run leaves out {left.rows:,} rows of the order after spikes: {ranges}")
        dataset = dataset.without(left)
    total_rows = int(composed.run.steps) * int(composed.run.global_rows)
    trained = [(n, rows) for n, rows in zip(dataset.source_names, dataset.train, strict=True) if rows.count]
    lengths = {name: lengths_of(rows) for name, rows in trained}
    console.print(_counts(dataset))
    for what in DESCRIBED.values():
        if (learned := _chat_table(dataset, what)) is not None:
            console.print(learned)
    if (media := _media_table(dataset)) is not None:
        console.print(media)
    console.print(_lengths_table(lengths))
    global_rows = int(composed.run.global_rows)
    console.print(_rows_table(dataset, data, steps=int(composed.run.steps), total_rows=total_rows))
    for name, place in dataset.blend.exhausted(total_rows):
        console.print(f"{name} has no rows left at step {place // global_rows + 1:,}: other sources take its share")
    try:
        dataset.blend.check_length(total_rows, global_rows=global_rows)
    except DataError as error:
        console.print(f"Training with this recipe would be refused: {error}", style="bold")
    if config.samples:
        _samples(dataset, config, console)
    thumbnails = dataset.folder / "media.png"
    if drawn := draw_media(dataset, thumbnails, documents=max(config.samples, _THUMBNAILS_A_LINE)):
        console.print(f"Thumbnails of {drawn:,} media: {printable(str(thumbnails))}")
    picture = Path(config.picture) if config.picture else dataset.folder / "lengths.png"
    draw(lengths, picture, row_tokens=data.row_tokens)
    console.print(f"Document lengths: {printable(str(picture))}")
    return 0


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head in ("source", "split") else "right")
    return table


def _counts(dataset: Dataset) -> Table:
    title = f"{printable(str(dataset.folder))}, data {dataset.manifest_hash[:12]}"
    table = _table(title, "source", "split", "shards", "documents", "tokens", "of all", "B/token")
    sources = dataset.manifest.sources
    all_tokens = sum(sources[name].count(split, "tokens") for name in dataset.source_names for split in SPLITS)
    for name in dataset.source_names:
        for split in SPLITS:
            documents, tokens, text = (sources[name].count(split, w) for w in ("documents", "tokens", "text_bytes"))
            table.add_row(
                name, split, f"{len(sources[name].splits[split]):,}", f"{documents:,}", f"{tokens:,}",
                f"{tokens / all_tokens:.1%}", f"{text / tokens:.2f}" if tokens else "-",
            )  # fmt: skip
    return table


def _lengths_table(lengths: dict[str, np.ndarray]) -> Table:
    table = _table("tokens a training document", "source", "mean", "median", "95 %", "longest")
    for name, some in lengths.items():
        middle, most = np.percentile(some, [50, 95])
        table.add_row(name, f"{some.mean():,.0f}", f"{middle:,.0f}", f"{most:,.0f}", f"{some.max():,}")
    return table


def _rows_table(dataset: Dataset, data: DataConfig, *, steps: int, total_rows: int) -> Table:
    table = _table(
        f"rows of {dataset.row_tokens:,} tokens ({_packing(dataset, data)}) in a run of {steps:,} steps, {total_rows:,} rows",
        "source", "rows", "left over", "documents cut", "of the run", "epochs",
    )  # fmt: skip
    drawn, epochs = dataset.blend.curriculum.drawn(total_rows), dataset.blend.epochs(total_rows)
    for index, (name, rows) in enumerate(zip(dataset.source_names, dataset.train, strict=True)):
        cut = f"{share_cut(rows, packing='best_fit' if rows.best_fit else 'chunk'):.1%}" if rows.count else "-"
        table.add_row(
            name, f"{rows.count:,}", f"{rows.cropped_tokens:,}", cut,
            f"{drawn[index] / max(1, total_rows):.2%}", f"{epochs[index]:.2f}",
        )  # fmt: skip
    return table


def _packing(dataset: Dataset, data: DataConfig) -> str:
    """How the rows are filled: chats are packed by `data.chat.packing`."""
    chats = "one chat a row" if data.chat.packing == "single" else "whole chats"
    kinds = {chats if rows.mask is not None else data.packing for rows in dataset.train}
    return ", ".join(sorted(kinds))


def _samples(dataset: Dataset, config: InspectConfig, console: Console) -> None:
    rng = np.random.default_rng(0)
    parts = zip(dataset.source_names, dataset.train, dataset.heldout, strict=True)
    for name, rows in ((name, train if train.count else heldout) for name, train, heldout in parts):
        for document in sorted(rng.choice(rows.stream.documents, min(config.samples, rows.stream.documents), False)):
            if rows.has_ranks:
                _show_preference(dataset, config, console, name, rows, int(document))
                continue
            start, stop = rows.stream.document_span(int(document))
            tokens = np.empty(min(stop - start, 4 * config.chars), dtype=rows.stream.dtype)
            rows.stream.read(start, tokens)
            origin = dataset.origin(rows.stream, int(document))
            console.print(f"\n{name} document {document:,}, {stop - start:,} tokens", style="bold")
            console.print(f"{printable(origin.file)} record {origin.record:,}", style="dim")
            if rows.mask is None:
                console.print(repr(dataset.tokenizer.decode(tokens.tolist())[: config.chars]))
            else:
                learned = _mask_of(rows, start, len(tokens))
                console.print(coloured(dataset.tokenizer, tokens, learned, chars=config.chars, console=console))


def _show_preference(
    dataset: Dataset, config: InspectConfig, console: Console, name: str, rows: Rows, document: int
) -> None:
    """Print the preference that a document is an answer of: the context once, and every answer."""
    answers = group_of(rows, document)
    origin = dataset.origin(rows.stream, answers[0])
    console.print(f"\n{name} preference with {len(answers):,} answers, document {answers[0]:,} on", style="bold")
    console.print(f"{printable(origin.file)} record {origin.record:,}", style="dim")
    for place, (answer, rank) in enumerate(zip(answers, rows.ranks_of(answers[0], len(answers))[:, 0], strict=True)):
        start, stop = rows.stream.document_span(answer)
        tokens, learned = rows.read_labels(start, stop - start), _mask_of(rows, start, stop - start)
        first, last = np.flatnonzero(learned)[[0, -1]]
        if not place:
            context = printable(repr(dataset.tokenizer.decode_all(tokens[:first].tolist()))[1:-1], most=1 << 30)
            console.print(f"{'...' if len(context) > config.chars else ''}{context[-config.chars :]}", markup=False)
        shown = slice(first, last + 1)
        text = coloured(dataset.tokenizer, tokens[shown], learned[shown], chars=config.chars, console=console)
        console.print(Text(f"{label_of(int(rank), len(answers))}: ", style="bold") + text)


def group_of(rows: Rows, document: int) -> list[int]:
    """Numbers of the documents that are answers of the same preference, best first."""
    first = document
    while not rows.ranks_of(first, 1)[0, 1]:
        first -= 1
    after = document + 1
    while after < rows.stream.documents and not rows.ranks_of(after, 1)[0, 1]:
        after += 1
    return list(range(first, after))


def label_of(rank: int, answers: int) -> str:
    """What an answer of a preference is called: chosen or rejected of a pair, otherwise its rank."""
    return ("chosen", "rejected")[rank] if answers == 2 else f"rank {rank}"


def _mask_of(rows: Rows, start: int, count: int) -> np.ndarray:
    assert rows.mask is not None, "only of chats and preferences"
    return rows.mask.read_labels(start, count) != 0


def coloured(tokenizer: Tokenizer, tokens: np.ndarray, learned: np.ndarray, *, chars: int, console: Console) -> Text:
    """A chat's beginning with its special tokens; what is learned is green, or between arrows where there are no colours."""
    edges = np.flatnonzero(np.diff(learned)) + 1
    text, left = Text(), chars
    for part, is_learned in zip(np.split(tokens, edges), np.split(learned, edges), strict=True):
        piece = printable(repr(tokenizer.decode_all(part.tolist()))[1:-1], most=left)
        left -= len(piece)
        if is_learned[0] and not console.is_terminal:
            piece = f"\u2192{piece}\u2190"
        text.append(piece, style="green" if is_learned[0] else None)
        if left <= 0:
            break
    return text


def _chat_table(dataset: Dataset, what: str) -> Table | None:
    """How many tokens are learned of sources of a kind (`store.manifest.DESCRIBED`); None without them."""
    sources = dataset.manifest.sources
    if not any(what in sources[name].description for name in dataset.source_names):
        return None
    counted = ["preferences", "pairs"] if what == "preferences" else []
    heads = [*counted, "learned", "of all", "fill up rows", "of all", "left out, longer than a row"]
    table = _table(what, "source", "split", *heads)
    for name in dataset.source_names:
        description = sources[name].description
        for split in SPLITS if what in description else ():
            counts, every = description[what][split], max(1, sources[name].count(split, "tokens"))
            table.add_row(
                name, split, *(f"{counts[key]:,}" for key in (("groups", "pairs") if counted else ())),
                f"{counts['learned']:,}", f"{counts['learned'] / every:.1%}", f"{counts['padding']:,}",
                f"{counts['padding'] / every:.1%}", f"{description['long_records']:,}" if split == "train" else "",
            )  # fmt: skip
    return table


def _media_table(dataset: Dataset) -> Table | None:
    """How many media the sources have; None without them."""
    counted = {
        (name, split): counts
        for name in dataset.source_names
        for split, counts in dataset.manifest.sources[name].description.get("media", {}).items()
    }
    if not counted:
        return None
    heads = ["images", "clips of audio", "frames of video", "different files", "bytes"]
    table = _table("media, before they are decoded", "source", "split", *heads)
    for (name, split), counts in counted.items():
        shown = [f"{counts[key]:,}" for key in ("images", "clips", "frames", "files")]
        table.add_row(name, split, *shown, units.size(counts["media_bytes"]))
    return table


def draw_media(dataset: Dataset, path: Path, *, documents: int) -> int:
    """Draw the media of some documents of each source, evenly spread, as the model gets them. -> number of media drawn."""
    shown: list[tuple[str, Decoded]] = []
    for name, train, heldout in zip(dataset.source_names, dataset.train, dataset.heldout, strict=True):
        rows = train if train.count else heldout
        if rows.media is None or not rows.stream.documents:
            continue
        chosen = np.unique(np.linspace(0, rows.stream.documents - 1, documents).astype(int))
        shown += [(f"{name} {d:,}", one) for d in chosen.tolist() for one in rows.media.decoded_items(d)]
    shown = shown[:_MOST_THUMBNAILS]
    if shown:
        lines = -(-len(shown) // _THUMBNAILS_A_LINE)
        with canvas(path, size=(1.3 * _THUMBNAILS_A_LINE, 1.5 * lines)) as figure:
            panels = figure.subplots(lines, _THUMBNAILS_A_LINE, squeeze=False).reshape(-1)
            for axes in panels:
                axes.set_axis_off()
            for axes, (label, one) in zip(panels, shown, strict=False):
                axes.set_title(f"{label}\n{seen_size(one.item)}", fontsize=5, fontweight="normal")
                if one.item.kind == AUDIO:
                    axes.imshow(one.values.T, origin="lower", aspect="auto")
                else:
                    grid = one.item.rows, one.item.columns
                    axes.imshow(np.asarray(image_of(one.values, grid, patch=dataset.media.patch)))
    return len(shown)


def _verify(data: DataConfig, console: Console) -> None:
    """Hash every file of the recipe's sources. DataError names a file that does not match its checksum."""
    if is_remote(data.folder):
        raise DataError(
            f"--verify reads local data, and data.folder={without_credentials(data.folder)} is remote. Copies of remote "
            f"shards are checked when they are fetched. Leave out --verify."
        )
    folder = Path(data.folder)
    manifest = read_manifest(folder)
    files = {
        entry.file_name(str(folder), suffix): facts
        for name in data.sources
        if name in manifest.sources
        for split in SPLITS
        for entry in manifest.sources[name].splits[split]
        for suffix, facts in entry.files.items()
    }
    with progress("checking", sum(facts.bytes for facts in files.values())) as advance:
        Verifier(folder, mode="always").check_all(files.items(), progress=advance)
    console.print(f"{len(files):,} files match their checksums.")


def draw(lengths: dict[str, np.ndarray], path: Path, *, row_tokens: int) -> None:
    """Draw one histogram per source: percentage of its tokens by the length of their document."""
    longest = max(int(some.max()) for some in lengths.values())
    shortest = min(int(some.min()) for some in lengths.values())
    edges = np.geomspace(min(shortest, row_tokens) * 0.9, max(longest, row_tokens) * 1.1, 48)
    with canvas(path, size=(8, 0.9 + 1.5 * len(lengths))) as figure:
        panels = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)
        for index, (name, some) in enumerate(lengths.items()):
            axes = panels[index, 0]
            axes.hist(some, bins=edges, weights=some / some.sum() * 100, color=SERIES[index % len(SERIES)])
            axes.axvline(row_tokens, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            axes.set_title(
                f"{name}: {len(some):,} documents, median {np.median(some):,.0f} tokens", loc="left", fontsize=9
            )
            axes.set_xscale("log")
            axes.set_ylabel("% of tokens")
            axes.grid(axis="y")
        top = panels[0, 0]
        top.annotate(
            f"a row ({row_tokens:,})", (row_tokens, top.get_ylim()[1]), (4, -2), textcoords="offset points",
            color=MUTED, fontsize=8, va="top",
        )  # fmt: skip
        last = panels[-1, 0]
        last.xaxis.set_major_formatter("{x:,.0f}")
        last.set_xlabel("tokens of a document")


if __name__ == "__main__":
    hand_over("inspect", *sys.argv[1:])
