"""From prepared data to batches, in an order that is a pure function of the position.

    open_dataset(config) -> Dataset       rows at any global positions, held-out rows of a source
    Stream(dataset, position=...)         one data-parallel rank's microbatches, step by step, read ahead by a thread

The state of a stream is one integer, the global position of its next step. A row's position does not depend on the
number of ranks, on the microbatch size or on the threads that read it.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from data.batch import Batch
from data.blend import Blend
from data.config import DataConfig
from data.errors import DataError
from data.manifest import SPLITS, TokenizerEntry, file_sha256, read_manifest
from data.pack import Rows
from data.shards import open_entry
from data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Dataset:
    """Prepared data, opened. Reading is thread-safe."""

    tokenizer: Tokenizer
    source_names: list[str]
    row_tokens: int
    manifest_hash: str
    """Identity of the data that positions refer to."""
    blend: Blend
    train: list[Rows]
    heldout: list[Rows]

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary: every id is below it."""
        return self.tokenizer.vocab_size

    def training_rows(self, positions: np.ndarray) -> Batch:
        """The rows at global `positions`."""
        draw = self.blend.draw(positions)
        tokens = np.empty((len(positions), self.row_tokens + 1), dtype=np.int64)
        documents = np.empty((len(positions), self.row_tokens), dtype=np.int32)
        for source in np.unique(draw.source):
            here = np.flatnonzero(draw.source == source)
            tokens[here] = self.train[source].tokens(draw.row[here])
            documents[here] = self.train[source].documents(draw.row[here])
        return self._batch(tokens, documents, draw.source, np.asarray(positions), what="training")

    def heldout_count(self, name: str) -> int:
        """Held-out rows of a source."""
        return self.heldout[self.source_names.index(name)].count

    def heldout_rows(self, name: str, start: int, count: int) -> Batch:
        """Held-out rows start ... start + count of a source, in the order of its documents."""
        source = self.source_names.index(name)
        rows = np.arange(start, start + count)
        part = self.heldout[source]
        return self._batch(
            part.tokens(rows), part.documents(rows), np.full(count, source), rows, what=f"held-out {name}"
        )

    def _batch(
        self, tokens: np.ndarray, documents: np.ndarray, source: np.ndarray, positions: np.ndarray, *, what: str
    ) -> Batch:
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"{what} rows hold token id {int(tokens.max()):,}, outside the vocabulary of {self.vocab_size:,}: a "
                f"shard was replaced or damaged. Check with data.manifest.read_manifest(verify=True), or prepare again."
            )
        both = torch.from_numpy(tokens)
        return Batch(
            tokens=both[:, :-1].contiguous(),
            labels=both[:, 1:].contiguous(),
            document_index=torch.from_numpy(documents),
            source=torch.from_numpy(source.astype(np.int32)),
            positions=positions,
        )


def open_dataset(config: DataConfig) -> Dataset:
    """Open prepared data: maps files, checks sizes and that recipe, shards and tokenizer belong together.

    Raises DataError naming what is missing or does not match, with the remedy.
    """
    folder = Path(config.folder)
    manifest = read_manifest(folder)
    tokenizer = _tokenizer(folder, manifest.tokenizer, config)
    missing = [name for name in config.sources if name not in manifest.sources]
    if missing:
        raise DataError(
            f"{folder} holds no source {', '.join(missing)} (it holds {', '.join(manifest.sources)}). Prepare the data "
            f"again, or take the source out of data.sources."
        )
    names = list(config.sources)
    parts: dict[str, list[Rows]] = {split: [] for split in SPLITS}
    for name in names:
        for split, rows in parts.items():
            shards = [open_entry(folder, entry) for entry in manifest.sources[name].splits[split]]
            rows.append(Rows(shards, config.row_tokens))
            if rows[-1].count == 0:
                raise DataError(
                    f"the {split} part of source {name!r} has {rows[-1].total_tokens:,} tokens, fewer than one row of "
                    f"data.row_tokens={config.row_tokens} and its label. Lower data.row_tokens, add text, or raise "
                    f"data.heldout_fraction."
                )
    blend = Blend(
        names,
        [config.sources[name].weight for name in names],
        [rows.count for rows in parts["train"]],
        seed=config.seed,
    )
    return Dataset(
        tokenizer=tokenizer,
        source_names=names,
        row_tokens=config.row_tokens,
        manifest_hash=manifest.hash,
        blend=blend,
        train=parts["train"],
        heldout=parts["heldout"],
    )


def _tokenizer(folder: Path, entry: TokenizerEntry, config: DataConfig) -> Tokenizer:
    """The folder's tokenizer, refused if it is not the one the shards were made with, to the byte."""
    path = folder / entry.file
    if path.is_file() and file_sha256(path) != entry.sha256:
        raise DataError(f"{path} is not the tokenizer the shards were made with. Prepare the data again.")
    return load_tokenizer(path, config.tokenizer, known_fingerprint=entry.fingerprint)


class Stream:
    """One data-parallel rank's share of every step, from `position` on.

    Microbatch m of rank r covers global rows position + (m ranks + r) microbatch_rows and the following. A thread reads
    ahead; what it raises is raised by `next`. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        position: int,
        global_rows: int,
        microbatch_rows: int,
        rank: int,
        ranks: int,
        prefetch_steps: int,
        pin: bool = False,
    ) -> None:
        assert global_rows % (microbatch_rows * ranks) == 0, "checked by the layout"
        self.position = position
        self._global_rows = global_rows
        self._microbatch_rows = microbatch_rows
        self._rank, self._ranks = rank, ranks
        self._dataset = dataset
        self._pin = pin
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=prefetch_steps)
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read_ahead, args=(position,), name="rows", daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """This rank's microbatches of the next step; `position` moves on by the step's rows."""
        step = self._ready.get()
        if isinstance(step, BaseException):
            raise step
        self.position += self._global_rows
        return step

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        self._closing.set()
        while self._reader.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._reader.join(timeout=0.05)

    def step_at(self, position: int) -> list[Batch]:
        """This rank's microbatches of the step that starts at `position`."""
        size = self._microbatch_rows
        starts = range(position + self._rank * size, position + self._global_rows, self._ranks * size)
        batches = [self._dataset.training_rows(np.arange(start, start + size)) for start in starts]
        return [batch.pinned() for batch in batches] if self._pin else batches

    def _read_ahead(self, position: int) -> None:
        while not self._closing.is_set():
            try:
                step: list[Batch] | BaseException = self.step_at(position)
            except BaseException as error:
                step = error
            position += self._global_rows
            while not self._closing.is_set():
                try:
                    self._ready.put(step, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(step, BaseException):
                return
