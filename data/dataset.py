"""Prepared data, opened: training rows at any global positions, held-out rows of a source, and the origin of both.

open_dataset(config)   reads manifest and tokenizer, checks checksums, makes the blend; a shard is opened when first read
  .training_rows(positions)   a Batch
  .heldout_rows(name, start, count)
  .locate(position)           source, row, epoch and documents of one row
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.batch import Batch, MediaBatch
from data.media.items import AUDIO
from data.order.blend import Blend, blend_of
from data.order.left_out import LeftOut
from data.prepared import identity_of, row_problems, source_problems, tokenizer_of
from data.rows.batch_memory import BatchArrays, read_batch
from data.rows.fim import Fim, build_fim, fold_key
from data.rows.media_rows import MediaRows
from data.rows.packing import Piece, Rows
from data.rows.read_ahead import FetchAhead
from data.rows.reader import ShardPool, TokenStream
from data.store.cache import Activity, RemoteFolder, is_remote
from data.store.manifest import LARGEST_TOKENIZER_BYTES, MANIFEST, SPLITS, Manifest, ShardEntry, read_manifest
from data.store.origins import Origin, Origins, read_origins
from data.store.verify import Verifier
from data.tokenizer import Tokenizer
from recipes.schema import units
from recipes.schema.credentials import without_credentials
from recipes.schema.data import DataConfig, MediaConfig
from recipes.schema.data_rules import data_problems
from recipes.schema.errors import DataError, refuse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowAt:
    """The documents of one training row."""

    position: int
    source: int
    row: int
    epoch: int
    pieces: list[Piece]
    """Its documents, or parts of them, in the row's order, as ranges of the source's stream."""


@dataclass(frozen=True)
class Dataset:
    """Prepared data, opened. Reading is thread-safe."""

    tokenizer: Tokenizer
    source_names: list[str]
    row_tokens: int
    manifest: Manifest
    blend: Blend
    train: list[Rows]
    heldout: list[Rows]
    reset_at_documents: bool
    """Whether batches have a `document_index`."""
    seed: int
    fim: Fim | None
    activity: Activity
    """What the reading threads are doing now, for messages about a stall."""
    folder: Path
    """Folder of the files, or of local copies of remote ones."""
    find: Callable[[ShardEntry, str], Path]
    """find(entry, suffix): the local, verified file of a shard."""
    media: MediaConfig
    """What images, audio and video are in a row, if there are sources of them."""
    remote: RemoteFolder | None = None
    """The remote folder of the shards. None if they are local."""

    @property
    def manifest_hash(self) -> str:
        """Identity of the data and of the order that positions refer to."""
        return identity_of(self.manifest, self.blend)

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary: every id is below it."""
        return self.tokenizer.vocab_size

    def without(self, left_out: LeftOut) -> "Dataset":
        """The same data without some rows of its order."""
        return replace(self, blend=self.blend.without(left_out))

    def training_rows(self, positions: np.ndarray) -> Batch:
        """The rows at global `positions`. DataError names a file with wrong content."""
        draw = self.blend.draw(positions)
        arrays = self._read(self.train, draw.source, draw.row)
        if self.fim is not None:
            for place, (source, row, epoch) in enumerate(zip(draw.source, draw.row, draw.epoch, strict=True)):
                pieces = self.train[source].pieces(int(row))
                self._rearrange(
                    arrays.tokens[place], arrays.labels[place], pieces, source=int(source), epoch=int(epoch)
                )
        return self._batch(self.train, arrays, draw.source, draw.row, np.asarray(positions))

    def fetch_ahead(self, position: int) -> FetchAhead | None:
        """Start fetching the shards of the rows from `position` on. None if the data is local or fetching ahead is off."""
        if self.remote is None or not self.remote.fetch_threads:
            return None
        return FetchAhead(self.blend, self.train, self.remote, position=position, threads=self.remote.fetch_threads)

    def heldout_count(self, name: str) -> int:
        """Number of held-out rows of a source."""
        return self.heldout[self.source_names.index(name)].count

    def heldout_rows(self, name: str, start: int, count: int) -> Batch:
        """Held-out rows start to start + count of a source, in the order of its documents, without fill in the middle."""
        source, rows = np.full(count, self.source_names.index(name)), np.arange(start, start + count)
        filled = self._read(self.heldout, source, rows)
        return self._batch(self.heldout, filled, source, rows, rows)

    def locate(self, position: int) -> RowAt:
        """The documents of the row at a position."""
        draw = self.blend.draw(np.array([position]))
        source, row = int(draw.source[0]), int(draw.row[0])
        return RowAt(position, source, row, int(draw.epoch[0]), self.train[source].pieces(row))

    def origin(self, stream: TokenStream, document: int) -> Origin:
        """File and record that a document of a source's stream came from."""
        return _origin(self.folder, self.find, stream, document)

    def origins(self, entry: ShardEntry) -> Origins:
        """Origins of a shard's documents."""
        return _origins(self.folder, self.find, entry)

    def _read(self, parts: list[Rows], source: np.ndarray, row: np.ndarray) -> BatchArrays:
        return read_batch(
            parts,
            source,
            row,
            vocab_size=self.vocab_size,
            with_documents=self.reset_at_documents,
            separate=self.fim is not None or any(part.best_fit for part in parts),
            activity=self.activity,
        )

    def _batch(
        self, parts: list[Rows], arrays: BatchArrays, source: np.ndarray, row: np.ndarray, positions: np.ndarray
    ) -> Batch:
        import torch  # takes seconds, and `stratum inspect` and `stratum trace` make no batches

        learned, ranked = self._learned(parts, source, row), _ranked(parts, source, row)
        with self.activity.of("decoding media"):
            media = _media(parts, source, row)
        return Batch(
            tokens=torch.from_numpy(arrays.tokens),
            labels=torch.from_numpy(arrays.labels),
            document_index=None if arrays.documents is None else torch.from_numpy(arrays.documents),
            source=torch.from_numpy(source.astype(np.int32)),
            positions=positions,
            learned=None if learned is None else torch.from_numpy(learned),
            ranks=None if ranked is None else torch.from_numpy(ranked[0]),
            groups=None if ranked is None else torch.from_numpy(ranked[1]),
            media=media,
        )

    def _learned(self, parts: list[Rows], source: np.ndarray, row: np.ndarray) -> np.ndarray | None:
        """[rows, row_tokens] bool: the labels that are learned; None if all are."""
        masks = [part.mask for part in parts]
        if not any(masks):
            return None
        learned = np.ones((len(row), self.row_tokens), dtype=bool)
        places = np.flatnonzero([masks[which] is not None for which in source])
        some = [mask or parts[which] for which, mask in enumerate(masks)]  # sources without a mask are not read
        if len(places):
            arrays = read_batch(
                some,
                source[places],
                row[places],
                vocab_size=2,
                with_documents=False,
                separate=False,
                activity=self.activity,
            )
            learned[places] = arrays.labels != 0
        return learned

    def _rearrange(
        self, inputs: np.ndarray, labels: np.ndarray, pieces: list[Piece], *, source: int, epoch: int
    ) -> None:
        """Fill in the middle, in place: rearranges each document's labels, then makes its inputs the labels before them.

        A document's first input is an end-of-document token and does not change.
        """
        if self.fim is None:
            return
        slot = 0
        for piece in pieces:
            stop = slot + piece.stop - piece.start
            labels[slot:stop] = self.fim.rearrange(
                labels[slot:stop], key=fold_key(self.seed, source, piece.start, epoch)
            )
            inputs[slot + 1 : stop] = labels[slot : stop - 1]
            slot = stop


def _origins(folder: Path, find: Callable[[ShardEntry, str], Path], entry: ShardEntry) -> Origins:
    return read_origins(folder, entry, file=find(entry, "origins") if "origins" in entry.files else None)


def _origin(folder: Path, find: Callable[[ShardEntry, str], Path], stream: TokenStream, document: int) -> Origin:
    which, local = stream.entry_of(document)
    return _origins(folder, find, stream.entries[which]).of(local)


def _ranked(parts: list[Rows], source: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(ranks, groups) of the rows' answers, as in a `Batch`; None if the data has no preferences."""
    if not any(part.has_ranks for part in parts):
        return None
    found = [parts[which].ranks_in(number) for which, number in zip(source.tolist(), row.tolist(), strict=True)]
    shape = len(found), max((len(answers) for answers in found), default=0)
    ranks, groups = np.full(shape, -1, dtype=np.int16), np.full(shape, -1, dtype=np.int32)
    for place, answers in enumerate(found):
        ranks[place, : len(answers)] = answers[:, 0]
        groups[place, : len(answers)] = answers[:, 1].cumsum(dtype=np.int32) - 1
    return ranks, groups


def _media(parts: list[Rows], source: np.ndarray, row: np.ndarray) -> MediaBatch | None:
    """The media of the rows, decoded; None if no source has media. Memory: what is returned, and one medium at its full size."""
    if (config := next((part.media.config for part in parts if part.media is not None), None)) is None:
        return None
    import torch  # as in `Dataset`: start-up

    places = enumerate(zip(source.tolist(), row.tolist(), strict=True))
    found = [(place, slot, one) for place, (which, number) in places for slot, one in parts[which].media_in(number)]
    images = [entry for entry in found if entry[2].item.kind != AUDIO]
    clips = [entry for entry in found if entry[2].item.kind == AUDIO]
    no_patches = np.empty((0, 3 * config.patch**2), dtype=np.uint8)
    no_mels = np.empty((0, config.mels), dtype=np.float32)
    grids = [[one.item.rows, one.item.columns] for *_, one in images]
    return MediaBatch(
        patches=torch.from_numpy(np.concatenate([no_patches, *(one.values for *_, one in images)])),
        grids=torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
        image_rows=torch.tensor([place for place, *_ in images], dtype=torch.int64),
        image_slots=torch.tensor([slot for _, slot, _ in images], dtype=torch.int64),
        mels=torch.from_numpy(np.concatenate([no_mels, *(one.values for *_, one in clips)])),
        clip_frames=torch.tensor([one.item.rows for *_, one in clips], dtype=torch.int64),
        clip_rows=torch.tensor([place for place, *_ in clips], dtype=torch.int64),
        clip_slots=torch.tensor([slot for _, slot, _ in clips], dtype=torch.int64),
    )


def open_dataset(config: DataConfig) -> Dataset:
    """Open prepared data. Checks the files as `data.verify` says, and that recipe, shards and tokenizer match.

    Raises DataError that names what is missing or does not match, with the remedy.
    """
    activity = Activity()
    remote: RemoteFolder | None = None
    if is_remote(config.folder):
        remote = RemoteFolder(config.folder, config.cache, activity)
        folder = remote.folder
        remote.local(MANIFEST)
        manifest = read_manifest(folder, check_files=False)
        remote.local(manifest.tokenizer.file, most_bytes=LARGEST_TOKENIZER_BYTES, sha256=manifest.tokenizer.sha256)

        def find(entry: ShardEntry, suffix: str) -> Path:
            assert remote is not None
            return remote.local(f"{entry.path}.{suffix}", entry.files[suffix])

    else:
        folder = Path(config.folder)
        manifest = read_manifest(folder)
        verifier = Verifier(folder, mode=config.verify)

        def find(entry: ShardEntry, suffix: str) -> Path:
            path = entry.file(folder, suffix)
            verifier.check(str(path), entry.files[suffix])
            return path

    pool = ShardPool(find, activity=activity, may_vanish=is_remote(config.folder))
    tokenizer = tokenizer_of(folder / manifest.tokenizer.file, manifest.tokenizer, config)
    refuse([*data_problems(config), *source_problems(config, manifest)], DataError)
    if is_remote(config.folder):
        _refuse_foreign_sets(config, manifest)
    names = list(config.sources)
    if remote is not None:
        _check_budget(config, manifest, remote.budget_bytes)
    if not is_remote(config.folder):
        verifier.check_all(
            {
                entry.file_name(str(folder), suffix): entry.files[suffix]
                for name in names
                for split in SPLITS
                for entry in manifest.sources[name].splits[split]
                for suffix in entry.token_files
            }.items()
        )

    def origin_in(stream: TokenStream, document: int) -> Origin:
        return _origin(folder, find, stream, document)

    parts: dict[str, list[Rows]] = {split: [] for split in SPLITS}
    for name in names:
        for split, rows in parts.items():
            entries = manifest.sources[name].splits[split]
            stream = TokenStream(entries, pool)
            masks = [found for entry in entries if (found := entry.mask) is not None]
            mask = None
            ranked = [found for entry in entries if (found := entry.ranks) is not None]
            items = [found for entry in entries if (found := entry.items) is not None]
            files = [found for entry in entries if (found := entry.media) is not None]
            media = None
            if items:
                if len(items) != len(entries):
                    raise DataError(f"source {name!r} has shards with and without media. Prepare the data again.")
                media = MediaRows(stream, TokenStream(items, pool), TokenStream(files, pool), config.media, origin_in)
            if masks:
                mask = Rows(TokenStream(masks, pool), row_tokens=config.row_tokens, eod=0, best_fit=False)
            # Chats and preferences were packed when they were prepared.
            is_packed = split == "train" and config.packing == "best_fit" and mask is None
            rows.append(
                Rows(
                    stream,
                    row_tokens=config.row_tokens,
                    eod=manifest.tokenizer.eod,
                    best_fit=is_packed,
                    sources=len(names),
                    mask=mask,
                    ranks=TokenStream(ranked, pool) if ranked else None,
                    media=media,
                )
            )
    refuse(row_problems(config, manifest), DataError)
    train = parts["train"]
    groups = [rows.rows_by_shard() for rows in train] if config.shuffle_shards else ()
    blend = blend_of(config, [rows.count for rows in train], groups=groups)
    return Dataset(
        tokenizer=tokenizer,
        source_names=names,
        row_tokens=config.row_tokens,
        manifest=manifest,
        blend=blend,
        train=train,
        heldout=parts["heldout"],
        reset_at_documents=config.reset_at_documents,
        seed=config.seed,
        fim=build_fim(config.fim, special=tokenizer.special, eod=tokenizer.eod) if config.fim.rate else None,
        activity=activity,
        folder=folder,
        find=find,
        media=config.media,
        remote=remote,
    )


def _check_budget(config: DataConfig, manifest: Manifest, budget_bytes: int) -> None:
    entries = (e for name in config.sources for split in SPLITS for e in manifest.sources[name].splits[split])
    size, path = max(
        ((sum(e.files[suffix].bytes for suffix in e.token_files), e.path) for e in entries), default=(0, "")
    )
    if size > budget_bytes:
        shown = without_credentials(config.folder)
        raise DataError(
            f"data.cache.gib={config.cache.gib:g} is less than one shard: shard {path} of {shown} takes "
            f"{units.gib(size)}. Set data.cache.gib to that or more, or prepare with a lower data.shard_bytes."
        )


def _refuse_foreign_sets(config: DataConfig, manifest: Manifest) -> None:
    """DataError if data behind a URL refers to files of the machine it was prepared on."""
    shown = without_credentials(config.folder)
    for name in config.sources:
        for entries in manifest.sources[name].splits.values():
            for entry in entries:
                if Path(entry.path).is_absolute():
                    raise DataError(
                        f"source {name!r} of {shown} was read in place from {entry.path}, which is not behind the "
                        f"URL. Copy it there and prepare again, or read the data where it was prepared."
                    )
