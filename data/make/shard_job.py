"""One job of `stratum prepare`: read its parts, tokenize, write a shard. One process does the whole job.

    SOURCE/00003.train.bin .idx .origins    SOURCE/00003.heldout.bin .idx .origins    SOURCE/00003.json, last

The `.json` contains the shard's manifest entries and the counts of its records. If it exists, the job is done.

A job whose text is longer than `shard_bytes` (one large compressed file, which cannot be cut) writes several shards:

    SOURCE/00003-000.*, SOURCE/00003-000.json    SOURCE/00003-001.*, SOURCE/00003-001.json    ...    SOURCE/00003.*

Each `.json` says at which part and record the next shard begins. After a kill, the job decompresses and reads again up to
that record, but does not tokenize again. Where a shard ends depends on the texts only, so the bytes are those of a run that
was not killed.
"""

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.chat.encode import ChatDocument, ChatEncoder, ChatTooLong
from data.chat.pack import MarkedDocument, RowPacker
from data.chat.preferences import MOST_ANSWERS, pair_count
from data.chat.template import ChatError, ChatTimeout
from data.make.corpus import Document, Reader, cut_in_two, digest, is_heldout
from data.make.megatron_sets import describe_set, unended_documents
from data.media.encode import MediaDocument, MediaEncoder, MediaTooLong
from data.media.items import AUDIO, FRAME, IMAGE, pack
from data.sources.files import is_remote, retry_if_remote
from data.sources.parts import problem_of
from data.sources.records import Part
from data.store.manifest import (
    ITEMS,
    ITEMS_DTYPE,
    MASK,
    MASK_DTYPE,
    MEDIA,
    MEDIA_DTYPE,
    RANKS,
    RANKS_DTYPE,
    SPLITS,
    ShardEntry,
    shard_entry,
)
from data.store.origins import pack_origins
from data.store.shards import ShardWriter, write_with_facts
from data.system import disk
from data.system.closing import Closing
from data.tokenizer import Tokenizer, Unencodable
from recipes.schema.data import ChatConfig, MediaConfig, SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import read_json

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20
"""A batch ends at whichever comes first. Tokenizing, progress and the end of a shard work batch by batch."""

_MOST_TIMEOUTS = 3
"""Chats of a job on which its template may take too long before the template is at fault, not the chats."""

log = logging.getLogger(__name__)

Report = Callable[[int, int, int], None]
"""Called with the stored bytes read, bytes of text and tokens written since the call before."""


@dataclass(frozen=True)
class ShardJob:
    """The input of one job."""

    folder: Path
    name: str
    """The source's name."""
    number: int
    """Index of this job among the source's jobs, from 0."""
    source: SourceConfig
    parts: list[Part]
    fixed_splits: Mapping[str, str]
    """{digest: split} of the texts, of any source, whose split does not follow from the digest (see `data.make.folder_plan`)."""
    is_single: bool
    """Whether the source is one document, which is cut into a training and a held-out text."""
    seed: int
    fraction: float
    """Fraction of the texts to hold out; 1 for a source that is only evaluated."""
    shard_bytes: int
    """Bytes of text after which a shard ends and the next begins."""
    chat: ChatConfig
    """How chats become tokens, if the source has chats."""
    media: MediaConfig
    """How media become tokens, if the source has media."""
    row_tokens: int
    """Tokens of the rows that chats and media are packed in."""

    @property
    def has_messages(self) -> bool:
        """Whether the source's records are chats or preferences."""
        return self.source.kind in ("chat", "preference")

    @property
    def is_packed(self) -> bool:
        """Whether documents are packed whole into rows, with a mask of what is learned."""
        return self.source.kind != "text"

    @property
    def prefix(self) -> str:
        """The shard's files in the folder, without split and suffix."""
        return f"{self.name}/{self.number:05d}"

    @property
    def result(self) -> Path:
        """Result file of the last shard. It exists once the job is done."""
        return self.folder / f"{self.prefix}.json"

    def early_prefix(self, number: int) -> str:
        """`prefix` of a shard that is not the job's last."""
        return f"{self.prefix}-{number:03d}"

    @property
    def size(self) -> int:
        """Stored bytes to read."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class PlainDocument:
    """A text as tokens, between its begin-of-document token, if any, and its end-of-document token."""

    ids: np.ndarray
    text_bytes: int


_Document = PlainDocument | MarkedDocument
_Group = Sequence[_Document]
"""Documents that belong into one row: the answers of a preference; otherwise one."""


@dataclass(frozen=True)
class ChatCounts:
    """What became of the chats, preferences or media of one split of a shard."""

    learned: int
    """Tokens that are learned."""
    padding: int
    """Tokens that rows were filled up with."""
    groups: int = 0
    """Preferences: answers to one context."""
    pairs: int = 0
    """Pairs of answers of different ranks."""
    images: int = 0
    clips: int = 0
    """Clips of audio."""
    frames: int = 0
    """Frames of video."""
    files: int = 0
    """Different media stored."""
    media_bytes: int = 0
    """Bytes of them."""


@dataclass(frozen=True)
class ShardResult:
    """The result of one shard: its manifest entries and counts."""

    splits: dict[str, ShardEntry]
    """Manifest entry by split. A split without documents is left out."""
    records: dict[str, int]
    """Records read of each file whose parts are in several shards. Later shards count their records from there."""
    bad_records: int = 0
    empty_documents: int = 0
    problems: tuple[str, ...] = ()
    unended: int = 0
    """Documents of a Megatron set that do not end with the end-of-document token."""
    unknown: int = 0
    """Number of unknown tokens written."""
    chats: dict[str, ChatCounts] = field(default_factory=dict)
    """By split, if the source has chats, preferences or media."""
    long_records: int = 0
    """Records left out because they are longer than a row."""
    next_part: int | None = None
    """Index of the part in which the job's next shard begins; None for its last shard."""
    next_record: int = 0
    """Number of the record, in that part, at which it begins."""


def make_shard(job: ShardJob, tokenizer: Tokenizer, *, threads: int, report: Report) -> None:
    """Write the shards of a job that do not exist yet (mostly one), with their results.

    DataError for bad input. A remote file that cannot be read is tried again.
    """
    job.result.parent.mkdir(parents=True, exist_ok=True)
    is_from_server = job.source.streaming or any(is_remote(part.file) for part in job.parts)
    retry_if_remote(is_from_server, lambda: _make(job, tokenizer, threads, report))


def read_results(job: ShardJob) -> list[ShardResult]:
    """The results of a finished job's shards, in order. DataError if one cannot be read."""
    return [*_early_results(job), _read_result(job.result)]


def _early_results(job: ShardJob) -> list[ShardResult]:
    """Results of the finished shards, except the job's last shard."""
    results: list[ShardResult] = []
    while (path := job.folder / f"{job.early_prefix(len(results))}.json").exists():
        results.append(_read_result(path))
    return results


def _read_result(path: Path) -> ShardResult:
    try:
        raw: dict[str, Any] = read_json(path, most_bytes=1 << 30)
        splits = {split: shard_entry(entry) for split, entry in raw["splits"].items()}
        chats = {split: ChatCounts(**counts) for split, counts in raw.get("chats", {}).items()}
        return ShardResult(**(raw | {"splits": splits, "problems": tuple(raw["problems"]), "chats": chats}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error!r}. Remove it and prepare again.") from error


def _write_result(path: Path, result: ShardResult) -> None:
    disk.write_text(path, json.dumps(asdict(result)), is_own=True)


@dataclass(frozen=True, slots=True)
class SplitText:
    """A document with its split."""

    split: str
    document: Document
    bytes: int
    """Length of the text in UTF-8."""


def with_splits(job: ShardJob, documents: Iterator[Document]) -> Iterator[SplitText]:
    """Each document with its split. The document of a single-document source becomes two, one for each split."""
    for document in documents:
        if job.is_single:
            train, heldout = cut_in_two(job.name, document.text, fraction=job.fraction)
            yield SplitText("train", replace(document, text=train), len(train.encode()))
            yield SplitText("heldout", replace(document, text=heldout), len(heldout.encode()))
            continue
        content = document.text.encode()
        yield SplitText(split_of(job, content), document, len(content))


def split_of(job: ShardJob, text: bytes) -> str:
    """The split of a text. It follows from the digest, except for the texts of `fixed_splits`."""
    text_digest = digest(text, seed=job.seed)
    if job.fraction < 1 and text_digest in job.fixed_splits:
        return job.fixed_splits[text_digest]
    return "heldout" if is_heldout(text_digest, fraction=job.fraction) else "train"


def _make(job: ShardJob, tokenizer: Tokenizer, threads: int, report: Report) -> None:
    if job.source.format == "megatron":
        (part,) = job.parts
        is_first = job.number == 0
        splits = describe_set(part.file, tokenizer, fraction=job.fraction, is_first=is_first, report=report)
        unended = unended_documents(part.file, tokenizer.eod)
        _write_result(job.result, ShardResult(splits=splits, records={}, unended=unended))
        return
    done = _early_results(job)
    start, record = (done[-1].next_part or 0, done[-1].next_record) if done else (0, 0)
    texts = _TextStream(job, Reader(job.name, job.source), part=start, record=record)
    number = len(done)
    with _Encoder(job, tokenizer, threads) as encoder:
        while (result := _write_shard(job, number, texts, encoder, report)).next_part is not None:
            _write_result(job.folder / f"{job.early_prefix(number)}.json", result)
            number += 1
    _write_result(job.result, result)


class _TextStream:
    """The texts of a job in batches, from a given part and record on. `part` and `record` follow the batches."""

    def __init__(self, job: ShardJob, reader: Reader, *, part: int, record: int) -> None:
        """part, record: index of the part to begin with, and of its first record to read."""
        self._job = job
        self.reader = reader
        self.part = part
        """Index of the part that the last batch came from."""
        self.record = record
        """The record of that part that follows the last batch."""
        self._reported = 0
        self.batches = self._batches()

    def _batches(self) -> Iterator[list[SplitText]]:
        while self.part < len(self._job.parts):
            documents = self.reader.documents(self._job.parts[self.part], first=self.record)
            for batch in _batches(with_splits(self._job, documents)):
                self.record = batch[-1].document.record + 1
                yield batch
            self.part, self.record = self.part + 1, 0

    def unreported_bytes(self) -> int:
        """Stored bytes read since the call before."""
        before = self._reported
        self._reported = sum(part.size for part in self._job.parts[: self.part])
        if self.part < len(self._job.parts):
            self._reported += self.reader.stored_bytes
        return self._reported - before


class _Encoder(Closing):
    """Turns the texts of a job into documents."""

    def __init__(self, job: ShardJob, tokenizer: Tokenizer, threads: int) -> None:
        self.tokenizer = tokenizer
        self._job = job
        self._threads = threads
        self.chats: ChatEncoder | None = None
        self.media: MediaEncoder | None = None
        self._timeouts = 0
        if job.has_messages:
            self.chats = ChatEncoder(job.chat, tokenizer, row_tokens=job.row_tokens, seed=job.seed)
        if job.source.kind == "media":
            self.media = MediaEncoder(job.media, tokenizer, row_tokens=job.row_tokens)

    @property
    def long_records(self) -> int:
        """Records left out so far because they are longer than a row."""
        return sum(encoder.long_records for encoder in (self.chats, self.media) if encoder is not None)

    def close(self) -> None:
        """End the process that renders chats."""
        if self.chats is not None:
            self.chats.close()

    def encoded(self, batch: list[SplitText], part: Part) -> Iterator[tuple[SplitText, list[_Group] | str]]:
        """Each text with its documents, or with what is wrong with it. part: where the batch was read."""
        if self.chats is not None:
            yield from ((text, self._chat(text, part)) for text in batch)
            return
        if self.media is not None:
            yield from ((text, self._medium(text, part, self.media)) for text in batch)
            return
        before, after = [] if self.tokenizer.bod is None else [self.tokenizer.bod], [self.tokenizer.eod]
        ids = _encoded([text.document.text for text in batch], self.tokenizer, self._threads)
        for text, numbers in zip(batch, ids, strict=True):
            problem = numbers if isinstance(numbers, str) else self.tokenizer.loss(text.document.text, numbers)
            if problem is not None or isinstance(numbers, str):
                yield text, str(problem)
            else:
                yield text, [[PlainDocument(np.concatenate([before, numbers, after]), text.bytes)]]

    def _medium(self, text: SplitText, part: Part, encoder: MediaEncoder) -> list[_Group] | str:
        try:
            document = encoder.document(text.document.text)
        except MediaTooLong as error:
            place = f"data.sources.{self._job.name}"
            raise DataError(problem_of(place, self._job.source, part, text.document.record, str(error))) from error
        except ValueError as error:
            return str(error)
        return [] if document is None else [[document]]

    def _chat(self, text: SplitText, part: Part) -> list[_Group] | str:
        assert self.chats is not None
        try:
            if self._job.source.kind == "preference":
                answers = self.chats.answers(text.document.text)
                return [answers] if answers else []
            return [[document] for document in self.chats.documents(text.document.text)]
        except ChatTooLong as error:
            place = f"data.sources.{self._job.name}"
            raise DataError(problem_of(place, self._job.source, part, text.document.record, str(error))) from error
        except ChatTimeout as error:
            self._timeouts += 1
            place = f"data.sources.{self._job.name}"
            message = problem_of(place, self._job.source, part, text.document.record, str(error))
            if self._timeouts == _MOST_TIMEOUTS:
                raise DataError(
                    f"{message}, after {_MOST_TIMEOUTS - 1} other chats: the template is at fault. Correct "
                    f"data.chat.template={self._job.chat.template}, or name another."
                ) from error
            if self._timeouts == 1 and self._job.source.on_bad_record == "skip":
                log.warning("%s. It is left out; preparing stops at time-out %d.", message, _MOST_TIMEOUTS)
            return str(error)
        except ChatError as error:
            return str(error)
        except RecursionError:
            return "is nested too deeply"


def _write_shard(job: ShardJob, number: int, texts: _TextStream, encoder: _Encoder, report: Report) -> ShardResult:
    """Write one shard of a job, up to `shard_bytes` of text or to the end of the job. -> its result, not yet on disk.

    The caller writes the result file last, so that a shard with a result file is complete.
    """
    reader, tokenizer = texts.reader, encoder.tokenizer
    reader.restart_counts()
    unknown = shard_bytes = 0
    long_before = encoder.long_records
    has_more = False
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(_Output(job, split, tokenizer)) for split in SPLITS}
        for batch in texts.batches:
            text_bytes = tokens = 0
            part = job.parts[texts.part]
            for text, groups in encoder.encoded(batch, part):
                if isinstance(groups, str):
                    reader.refuse(part, text.document.record, groups)
                    continue
                for group in groups:
                    unknown += sum(tokenizer.unknown_count(document.ids) for document in group)
                    outputs[text.split].add(text, group)
                    tokens += sum(len(document.ids) for document in group)
                text_bytes += text.bytes
            report(texts.unreported_bytes(), text_bytes, tokens)
            shard_bytes += text_bytes
            if shard_bytes >= job.shard_bytes and not job.is_single:  # the two texts of a single document stay together
                has_more = True
                break
        else:  # no text is left: report the bytes after the last one
            report(texts.unreported_bytes(), 0, 0)
        prefix = job.early_prefix(number) if has_more else job.prefix
        splits = {}
        for split, output in outputs.items():
            output.flush()
            if output.files:
                splits[split] = output.finish(f"{prefix}.{split}")
    return ShardResult(
        splits=splits,
        # Counts are needed only for a file cut into several jobs, and a job of such a part has no other part (parts.cut).
        records=reader.records if len(job.parts) == 1 and not has_more else {},
        bad_records=reader.bad_records,
        empty_documents=reader.empty_documents,
        problems=tuple(reader.problems),
        unknown=unknown,
        chats={split: output.counts for split, output in outputs.items() if job.is_packed},
        long_records=encoder.long_records - long_before,
        next_part=texts.part if has_more else None,
        next_record=texts.record if has_more else 0,
    )


class _Output(Closing):
    """The files of one split of a shard while they are written. The mask of chats, the ranks of preferences, and the items and
    bytes of media are sets of files of their own (`store.shards`)."""

    def __init__(self, job: ShardJob, split: str, tokenizer: Tokenizer) -> None:
        self._folder = job.folder
        self._writer = ShardWriter(job.folder / f"{job.prefix}.{split}", vocab_size=tokenizer.vocab_size)
        self._more: dict[str, ShardWriter] = {}
        self._packer: RowPacker[SplitText, MarkedDocument] | None = None
        if job.is_packed:
            self._open_set(job, split, MASK, vocab_size=2, dtype=MASK_DTYPE)
            is_single = job.has_messages and job.chat.packing == "single"
            self._packer = RowPacker(job.row_tokens, tokenizer.eod, is_single=is_single)
        if job.source.kind == "media":
            self._open_set(job, split, ITEMS, vocab_size=1 << 62, dtype=ITEMS_DTYPE)
            self._open_set(job, split, MEDIA, vocab_size=256, dtype=MEDIA_DTYPE)
        self._numbers: dict[bytes, int] = {}
        """Number of each medium of the shard, by its digest."""
        self._items = dict.fromkeys((IMAGE, AUDIO, FRAME), 0)
        if job.source.kind == "preference":
            self._open_set(job, split, RANKS, vocab_size=MOST_ANSWERS + 1, dtype=RANKS_DTYPE)
        self._learned = self._groups = self._pairs = 0
        self._starts: list[int] = []
        self._records = array("I")
        self._text_bytes = 0
        self.files: list[str] = []

    def close(self) -> None:
        """Close all files, and remove those that were not finished."""
        for writer in (self._writer, *self._more.values()):
            writer.close()

    def _open_set(self, job: ShardJob, split: str, name: str, *, vocab_size: int, dtype: str) -> None:
        prefix = job.folder / f"{job.prefix}.{split}.{name}"
        self._more[name] = ShardWriter(prefix, vocab_size=vocab_size, dtype=dtype)

    @property
    def counts(self) -> ChatCounts:
        """What was written of chats, preferences and media."""
        padding = self._packer.padding if self._packer is not None else 0
        return ChatCounts(
            self._learned,
            padding,
            groups=self._groups,
            pairs=self._pairs,
            images=self._items[IMAGE],
            clips=self._items[AUDIO],
            frames=self._items[FRAME],
            files=len(self._numbers),
            media_bytes=self._more[MEDIA].tokens if MEDIA in self._more else 0,
        )

    def add(self, text: SplitText, group: _Group) -> None:
        """Append documents that belong into one row; of chats and preferences, when that row is finished."""
        if self._packer is None:
            for document in group:
                self._write(text, document)
            return
        chats = [document for document in group if isinstance(document, MarkedDocument)]
        ranks = [chat.rank for chat in chats if isinstance(chat, ChatDocument) and chat.rank is not None]
        self._groups += bool(ranks)
        self._pairs += pair_count(ranks)
        for where, chat in self._packer.add(text, *chats):
            self._write(where, chat)

    def flush(self) -> None:
        """Append what waits for its row to be finished."""
        if self._packer is not None:
            for where, chat in self._packer.finish():
                self._write(where, chat)

    def _write(self, text: SplitText, document: _Document) -> None:
        if self.files[-1:] != [text.document.file]:
            self.files.append(text.document.file)
            self._starts.append(len(self._records))
        self._records.append(text.document.record)
        self._text_bytes += document.text_bytes
        self._writer.add(document.ids)
        if isinstance(document, MarkedDocument):
            self._more[MASK].add(document.learned)
            self._learned += int(document.learned.sum())
        if isinstance(document, ChatDocument) and document.rank is not None:
            self._more[RANKS].add([document.rank, document.begins_group])
        if isinstance(document, MediaDocument):
            numbers = [self._stored(content) for content in document.files]
            self._more[ITEMS].add(pack([replace(item, file=numbers[item.file]) for item in document.items]))
            for item in document.items:
                self._items[item.kind] += 1

    def _stored(self, content: bytes) -> int:
        """Number of a medium in the shard. It is written if it is the first of its content."""
        key = hashlib.sha256(content).digest()
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._more[MEDIA].add_bytes(content)
        return self._numbers[key]

    def finish(self, name: str) -> ShardEntry:
        """Give the files their final name (in the folder, without suffix). -> the manifest's entry."""
        self._writer.prefix = self._folder / name
        facts = self._writer.finish()
        for kind, writer in self._more.items():
            writer.prefix = self._folder / f"{name}.{kind}"
            facts |= {f"{kind}.{suffix}": found for suffix, found in writer.finish().items()}
        content = pack_origins(self.files, self._starts, np.asarray(self._records, dtype=np.uint32))
        facts["origins"] = write_with_facts(self._folder / f"{name}.origins", content)
        return ShardEntry(
            path=name,
            documents=len(self._records),
            tokens=self._writer.tokens,
            text_bytes=self._text_bytes,
            dtype=self._writer.dtype.name,
            files=facts,
        )


def _encoded(texts: list[str], tokenizer: Tokenizer, threads: int) -> list[np.ndarray | str]:
    """Ids of each text, or the reason why it cannot be encoded.

    If a batch fails, each of its texts is encoded alone to find the bad one.
    """
    try:
        return list(tokenizer.encode_batch(texts, threads=threads))
    except Unencodable as error:
        if len(texts) == 1:
            return [str(error)]
    return [result for text in texts for result in _encoded([text], tokenizer, threads)]


def _batches(texts: Iterator[SplitText]) -> Iterator[list[SplitText]]:
    """Texts in batches of bounded number and size, so that memory does not grow with their number."""
    batch: list[SplitText] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.document.text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
