"""One job of preparing: read its parts, tokenize, write a shard. One process does a job from beginning to end.

    SOURCE/00003.train.bin .idx .origins    SOURCE/00003.heldout.bin .idx .origins    SOURCE/00003.json, last

The `.json` has the shard's entries of the manifest and the counts of its records. If it exists, the job is done.

A job whose text is longer than `shard_bytes` (a large compressed file) writes several shards, one after the other:

    SOURCE/00003-000.*, SOURCE/00003-000.json    SOURCE/00003-001.*, SOURCE/00003-001.json    ...    SOURCE/00003.*

Each `.json` says where the next shard begins. After a kill, the job decompresses and reads up to this place again, but does
not tokenize again. Where a shard ends depends on the texts only, so the bytes are those of an undisturbed run.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.chat.encode import ChatDocument, ChatEncoder, ChatTooLong
from data.chat.pack import RowPacker
from data.chat.template import ChatError
from data.make.corpus import Document, Reader, cut_in_two, digest, held_out
from data.make.megatron_sets import describe_set, unended_documents
from data.sources.files import again_where_far, is_remote
from data.sources.parts import problem_of
from data.sources.records import Part
from data.store.manifest import MASK, MASK_DTYPE, SPLITS, ShardEntry, shard_entry
from data.store.origins import pack_origins
from data.store.shards import ShardWriter, write_with_facts
from data.system import disk
from data.tokenizer import Tokenizer, Unencodable
from recipes.schema.data import ChatConfig, SourceConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import read_json

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20

Report = Callable[[int, int, int], None]
"""Called with stored bytes read, bytes of text and tokens written, since the call before."""


@dataclass(frozen=True)
class ShardJob:
    """The input of one job."""

    folder: Path
    name: str
    """Of the source."""
    number: int
    source: SourceConfig
    parts: list[Part]
    dealt: Mapping[str, str]
    """Split by digest, of texts of any source whose split does not follow from the digest (see `data.make.shard_work`)."""
    is_single: bool
    """Whether the source is one document, which is cut in two."""
    seed: int
    fraction: float
    shard_bytes: int
    """Bytes of text after which a shard ends and the next begins."""
    chat: ChatConfig
    """How chats become tokens, if the source has chats."""
    row_tokens: int
    """Tokens of the rows that chats are packed in."""

    @property
    def is_chat(self) -> bool:
        """Whether the source's records are chats."""
        return self.source.kind == "chat"

    @property
    def prefix(self) -> str:
        """The shard's files in the folder, without split and suffix."""
        return f"{self.name}/{self.number:05d}"

    @property
    def result(self) -> Path:
        """File of the result of its last shard: it exists once the job is done."""
        return self.folder / f"{self.prefix}.json"

    def early_prefix(self, number: int) -> str:
        """`prefix` of a shard before the last."""
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


_Document = PlainDocument | ChatDocument


@dataclass(frozen=True)
class ChatCounts:
    """What became of the chats of one split of a shard."""

    learned: int
    """Tokens that are learned."""
    padding: int
    """Tokens that rows were filled up with."""


@dataclass(frozen=True)
class ShardResult:
    """The result of one shard: its manifest entries and counts."""

    splits: dict[str, ShardEntry]
    """By split; one without documents is missing."""
    records: dict[str, int]
    """Records read of each file that is cut over several shards."""
    bad_records: int = 0
    empty_documents: int = 0
    problems: tuple[str, ...] = ()
    unended: int = 0
    """Documents of an existing set without an end-of-document token."""
    unknown: int = 0
    """Unknown tokens that were written."""
    chats: dict[str, ChatCounts] = field(default_factory=dict)
    """By split, if the source has chats."""
    long_records: int = 0
    """Chats left out because they are longer than a row."""
    next_part: int | None = None
    """Index of the part in which the job's next shard begins; None for its last shard."""
    next_record: int = 0
    """Record of that part at which it begins."""


def make_shard(job: ShardJob, tokenizer: Tokenizer, *, threads: int, report: Report) -> None:
    """Write the shard of a job, or all of its shards that do not exist yet, with their results.

    DataError for bad input; a remote file that cannot be read is tried again.
    """
    job.result.parent.mkdir(parents=True, exist_ok=True)
    is_far = job.source.streaming or any(is_remote(part.file) for part in job.parts)
    again_where_far(is_far, lambda: _make(job, tokenizer, threads, report))


def read_results(job: ShardJob) -> list[ShardResult]:
    """The results of a finished job's shards, in order. DataError if one cannot be read."""
    return [*_early_results(job), _read_result(job.result)]


def _early_results(job: ShardJob) -> list[ShardResult]:
    """Results of the shards before the last that are finished."""
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
class Text:
    """A document and where it goes."""

    split: str
    document: Document
    bytes: int


def dealt(job: ShardJob, documents: Iterator[Document]) -> Iterator[Text]:
    """Each document with its split; a source that is one document is cut in two."""
    for document in documents:
        if job.is_single:
            train, heldout = cut_in_two(job.name, document.text, fraction=job.fraction)
            yield Text("train", replace(document, text=train), len(train.encode()))
            yield Text("heldout", replace(document, text=heldout), len(heldout.encode()))
            continue
        content = document.text.encode()
        yield Text(split_of(job, content), document, len(content))


def split_of(job: ShardJob, text: bytes) -> str:
    """The split of a text: by its digest, but for those that make sure that no source's split is empty."""
    known = digest(text, seed=job.seed)
    if job.fraction < 1 and known in job.dealt:
        return job.dealt[known]
    return "heldout" if held_out(known, fraction=job.fraction) else "train"


def _make(job: ShardJob, tokenizer: Tokenizer, threads: int, report: Report) -> None:
    if job.source.format == "megatron":
        (part,) = job.parts
        first = job.number == 0
        splits = describe_set(part.file, tokenizer, fraction=job.fraction, first=first, report=report)
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
    """The texts of a job in batches, from a place in its parts on. The place moves with each batch."""

    def __init__(self, job: ShardJob, reader: Reader, *, part: int, record: int) -> None:
        """part, record: index of the first part, and the first record of it."""
        self._job = job
        self.reader = reader
        self.part = part
        """Index of the part that the last batch came from."""
        self.record = record
        """Record of that part after the last batch."""
        self._reported = 0
        self.batches = self._batches()

    def _batches(self) -> Iterator[list[Text]]:
        while self.part < len(self._job.parts):
            documents = self.reader.documents(self._job.parts[self.part], first=self.record)
            for batch in _batches(dealt(self._job, documents)):
                self.record = batch[-1].document.record + 1
                yield batch
            self.part, self.record = self.part + 1, 0

    def unreported_bytes(self) -> int:
        """Stored bytes that were read since the call before."""
        before = self._reported
        self._reported = sum(part.size for part in self._job.parts[: self.part])
        if self.part < len(self._job.parts):
            self._reported += self.reader.stored_bytes
        return self._reported - before


class _Encoder:
    """Turns the texts of a job into documents."""

    def __init__(self, job: ShardJob, tokenizer: Tokenizer, threads: int) -> None:
        self.tokenizer = tokenizer
        self._job = job
        self._threads = threads
        self.chats: ChatEncoder | None = None
        if job.is_chat:
            self.chats = ChatEncoder(job.chat, tokenizer, row_tokens=job.row_tokens, seed=job.seed)

    def __enter__(self) -> "_Encoder":
        return self

    def __exit__(self, *ended: Any) -> None:
        if self.chats is not None:
            self.chats.__exit__(*ended)

    def encoded(self, batch: list[Text], part: Part) -> Iterator[tuple[Text, list[_Document] | str]]:
        """Each text with its documents, or with what is wrong with it. part: where the batch was read."""
        if self.chats is not None:
            yield from ((text, self._chat(text, part)) for text in batch)
            return
        before, after = [] if self.tokenizer.bod is None else [self.tokenizer.bod], [self.tokenizer.eod]
        ids = _encoded([text.document.text for text in batch], self.tokenizer, self._threads)
        for text, numbers in zip(batch, ids, strict=True):
            problem = numbers if isinstance(numbers, str) else self.tokenizer.loss(text.document.text, numbers)
            if problem is not None or isinstance(numbers, str):
                yield text, str(problem)
            else:
                yield text, [PlainDocument(np.concatenate([before, numbers, after]), text.bytes)]

    def _chat(self, text: Text, part: Part) -> list[_Document] | str:
        assert self.chats is not None
        try:
            return [*self.chats.documents(text.document.text)]
        except ChatTooLong as error:
            place = f"data.sources.{self._job.name}"
            raise DataError(problem_of(place, self._job.source, part, text.document.record, str(error))) from error
        except ChatError as error:
            return str(error)


def _write_shard(job: ShardJob, number: int, texts: _TextStream, encoder: _Encoder, report: Report) -> ShardResult:
    """Write one shard of a job, up to `shard_bytes` of text or to the end. -> its result, which is not written yet."""
    reader, tokenizer = texts.reader, encoder.tokenizer
    reader.restart_counts()
    unknown = shard_bytes = 0
    long_before = encoder.chats.long_records if encoder.chats is not None else 0
    has_more = False
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(_Output(job, split, tokenizer)) for split in SPLITS}
        for batch in texts.batches:
            text_bytes = tokens = 0
            part = job.parts[texts.part]
            for text, documents in encoder.encoded(batch, part):
                if isinstance(documents, str):
                    reader.refuse(part, text.document.record, documents)
                    continue
                for document in documents:
                    unknown += tokenizer.unknown_count(document.ids)
                    outputs[text.split].add(text, document)
                    tokens += len(document.ids)
                text_bytes += text.bytes
            report(texts.unreported_bytes(), text_bytes, tokens)
            shard_bytes += text_bytes
            if shard_bytes >= job.shard_bytes and not job.is_single:  # the two texts of a single document stay together
                has_more = True
                break
        else:
            report(texts.unreported_bytes(), 0, 0)
        prefix = job.early_prefix(number) if has_more else job.prefix
        splits = {}
        for split, output in outputs.items():
            output.flush()
            if output.files:
                splits[split] = output.finish(f"{prefix}.{split}")
    return ShardResult(
        splits=splits,
        records=reader.records if len(job.parts) == 1 and not has_more else {},
        bad_records=reader.bad_records,
        empty_documents=reader.empty_documents,
        problems=tuple(reader.problems),
        unknown=unknown,
        chats={split: output.counts for split, output in outputs.items() if job.is_chat},
        long_records=encoder.chats.long_records - long_before if encoder.chats is not None else 0,
        next_part=texts.part if has_more else None,
        next_record=texts.record if has_more else 0,
    )


class _Output:
    """The files of one split of a shard, in the making. Chats have their mask in a second set of files (`store.shards`)."""

    def __init__(self, job: ShardJob, split: str, tokenizer: Tokenizer) -> None:
        self._folder = job.folder
        self._writer = ShardWriter(job.folder / f"{job.prefix}.{split}", vocab_size=tokenizer.vocab_size)
        self._mask: ShardWriter | None = None
        self._packer: RowPacker[Text] | None = None
        if job.is_chat:
            self._mask = ShardWriter(job.folder / f"{job.prefix}.{split}.{MASK}", vocab_size=2, dtype=MASK_DTYPE)
            self._packer = RowPacker(job.row_tokens, tokenizer.eod, is_single=job.chat.packing == "single")
        self._learned = 0
        self._starts: list[int] = []
        self._records = array("I")
        self._text_bytes = 0
        self.files: list[str] = []

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *ended: Any) -> None:
        for writer in (self._writer, self._mask):
            if writer is not None:
                writer.__exit__(*ended)

    @property
    def counts(self) -> ChatCounts:
        """What was written of chats."""
        return ChatCounts(self._learned, self._packer.padding if self._packer is not None else 0)

    def add(self, text: Text, document: _Document) -> None:
        """Append a document; a chat when its row is finished."""
        if self._packer is None:
            self._write(text, document)
            return
        assert isinstance(document, ChatDocument)
        for where, chat in self._packer.add(text, document):
            self._write(where, chat)

    def flush(self) -> None:
        """Append what waits for its row to be finished."""
        if self._packer is not None:
            for where, chat in self._packer.finish():
                self._write(where, chat)

    def _write(self, text: Text, document: _Document) -> None:
        if self.files[-1:] != [text.document.file]:
            self.files.append(text.document.file)
            self._starts.append(len(self._records))
        self._records.append(text.document.record)
        self._text_bytes += document.text_bytes
        self._writer.add(document.ids)
        if self._mask is not None:
            assert isinstance(document, ChatDocument)
            self._mask.add(document.learned)
            self._learned += int(document.learned.sum())

    def finish(self, name: str) -> ShardEntry:
        """Make the files visible under their name in the folder, without suffix. -> the manifest's entry."""
        self._writer.prefix = self._folder / name
        facts = self._writer.finish()
        if self._mask is not None:
            self._mask.prefix = self._folder / f"{name}.{MASK}"
            facts |= {f"{MASK}.{suffix}": found for suffix, found in self._mask.finish().items()}
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
    """Ids of each text, or what is wrong with it."""
    try:
        return list(tokenizer.encode_batch(texts, threads=threads))
    except Unencodable as error:
        if len(texts) == 1:
            return [str(error)]
    return [result for text in texts for result in _encoded([text], tokenizer, threads)]


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    """Texts in batches bounded by number and size, so that memory does not depend on either."""
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.document.text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
