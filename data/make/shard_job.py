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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.make.corpus import Document, Reader, cut_in_two, digest, held_out
from data.make.megatron_sets import describe_set, unended_documents
from data.sources.files import again_where_far, is_remote
from data.sources.records import Part
from data.store.manifest import SPLITS, ShardEntry, shard_entry
from data.store.origins import pack_origins
from data.store.shards import ShardWriter, write_with_facts
from data.system import disk
from data.tokenizer import Tokenizer, Unencodable
from recipes.schema.data import SourceConfig
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
        return ShardResult(**(raw | {"splits": splits, "problems": tuple(raw["problems"])}))
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
    while (result := _write_shard(job, number, texts, tokenizer, threads, report)).next_part is not None:
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


def _write_shard(
    job: ShardJob, number: int, texts: _TextStream, tokenizer: Tokenizer, threads: int, report: Report
) -> ShardResult:
    """Write one shard of a job, up to `shard_bytes` of text or to the end. -> its result, which is not written yet."""
    reader = texts.reader
    reader.restart_counts()
    unknown = shard_bytes = 0
    has_more = False
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(_Output(job, split, tokenizer)) for split in SPLITS}
        for batch in texts.batches:
            text_bytes = tokens = 0
            ids = _encoded([text.document.text for text in batch], tokenizer, threads)
            for text, numbers in zip(batch, ids, strict=True):
                problem = numbers if isinstance(numbers, str) else tokenizer.loss(text.document.text, numbers)
                if problem is not None or isinstance(numbers, str):
                    reader.refuse(job.parts[texts.part], text.document.record, str(problem))
                    continue
                unknown += tokenizer.unknown_count(numbers)
                outputs[text.split].add(text, numbers)
                text_bytes += text.bytes
                tokens += len(numbers) + 1 + (tokenizer.bod is not None)
            report(texts.unreported_bytes(), text_bytes, tokens)
            shard_bytes += text_bytes
            if shard_bytes >= job.shard_bytes and not job.is_single:  # the two texts of a single document stay together
                has_more = True
                break
        else:
            report(texts.unreported_bytes(), 0, 0)
        prefix = job.early_prefix(number) if has_more else job.prefix
        splits = {split: output.finish(f"{prefix}.{split}") for split, output in outputs.items() if output.files}
    return ShardResult(
        splits=splits,
        records=reader.records if len(job.parts) == 1 and not has_more else {},
        bad_records=reader.bad_records,
        empty_documents=reader.empty_documents,
        problems=tuple(reader.problems),
        unknown=unknown,
        next_part=texts.part if has_more else None,
        next_record=texts.record if has_more else 0,
    )


class _Output:
    """The files of one split of a shard, in the making."""

    def __init__(self, job: ShardJob, split: str, tokenizer: Tokenizer) -> None:
        self._folder = job.folder
        self._begin = [] if tokenizer.bod is None else [tokenizer.bod]
        self._eod = tokenizer.eod
        self._writer = ShardWriter(job.folder / f"{job.prefix}.{split}", vocab_size=tokenizer.vocab_size)
        self._starts: list[int] = []
        self._records = array("I")
        self._text_bytes = 0
        self.files: list[str] = []

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *ended: Any) -> None:
        self._writer.__exit__(*ended)

    def add(self, text: Text, ids: np.ndarray) -> None:
        """Append a document between its begin-of-document token, if any, and its end-of-document token."""
        if self.files[-1:] != [text.document.file]:
            self.files.append(text.document.file)
            self._starts.append(len(self._records))
        self._records.append(text.document.record)
        self._text_bytes += text.bytes
        self._writer.add(np.concatenate([self._begin, ids, [self._eod]]) if self._begin else np.append(ids, self._eod))

    def finish(self, name: str) -> ShardEntry:
        """Make the files visible under their name in the folder, without suffix. -> the manifest's entry."""
        self._writer.prefix = self._folder / name
        facts = self._writer.finish()
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
