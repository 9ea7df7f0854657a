"""One shard: read its parts, tokenize, write. All that one process does in one go, and does again after a kill.

    SOURCE/00003.train.bin .idx .origins    SOURCE/00003.heldout.bin .idx .origins    SOURCE/00003.json, last

The `.json` holds the shard's entries of the manifest and what was counted; where it is, the shard is done.
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
    """What one shard is made from."""

    folder: Path
    name: str
    """Of the source."""
    number: int
    source: SourceConfig
    parts: list[Part]
    dealt: Mapping[str, str]
    """Split by digest, of the texts of all sources that are in it whatever their number says (see `data.make.shard_work`)."""
    is_single: bool
    """Whether the source is one document, which is cut in two."""
    seed: int
    fraction: float

    @property
    def prefix(self) -> str:
        """The shard's files in the folder, without split and suffix."""
        return f"{self.name}/{self.number:05d}"

    @property
    def result(self) -> Path:
        """Where its result lies when it is done."""
        return self.folder / f"{self.prefix}.json"

    @property
    def size(self) -> int:
        """Stored bytes to read."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class ShardResult:
    """What a shard came out as."""

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


def make_shard(job: ShardJob, tokenizer: Tokenizer, *, threads: int, report: Report) -> None:
    """Write one shard and its result. DataError for bad input; a remote file that cannot be read is tried again."""
    job.result.parent.mkdir(parents=True, exist_ok=True)
    is_far = job.source.streaming or any(is_remote(part.file) for part in job.parts)
    result = again_where_far(is_far, lambda: _make(job, tokenizer, threads, report))
    disk.write_text(job.result, json.dumps(asdict(result)), is_own=True)


def read_result(job: ShardJob) -> ShardResult:
    """The result of a finished shard. DataError where it cannot be read."""
    try:
        raw: dict[str, Any] = read_json(job.result, most_bytes=1 << 30)
        splits = {split: shard_entry(entry) for split, entry in raw["splits"].items()}
        return ShardResult(**(raw | {"splits": splits, "problems": tuple(raw["problems"])}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{job.result} cannot be read: {error!r}. Remove it and prepare again.") from error


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


def _make(job: ShardJob, tokenizer: Tokenizer, threads: int, report: Report) -> ShardResult:
    if job.source.format == "megatron":
        (part,) = job.parts
        first = job.number == 0
        splits = describe_set(part.file, tokenizer, fraction=job.fraction, first=first, report=report)
        return ShardResult(splits=splits, records={}, unended=unended_documents(part.file, tokenizer.eod))
    reader = Reader(job.name, job.source)
    unknown = 0
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(_Output(job, split, tokenizer)) for split in SPLITS}
        for part in job.parts:
            seen = 0
            for batch in _batches(dealt(job, reader.documents(part))):
                text_bytes = tokens = 0
                ids = _encoded([text.document.text for text in batch], tokenizer, threads)
                for text, numbers in zip(batch, ids, strict=True):
                    problem = numbers if isinstance(numbers, str) else tokenizer.loss(text.document.text, numbers)
                    if problem is not None or isinstance(numbers, str):
                        reader.refuse(part, text.document.record, str(problem))
                        continue
                    unknown += tokenizer.unknown_count(numbers)
                    outputs[text.split].add(text, numbers)
                    text_bytes += text.bytes
                    tokens += len(numbers) + 1 + (tokenizer.bod is not None)
                report(reader.stored_bytes - seen, text_bytes, tokens)
                seen = reader.stored_bytes
            report(part.size - seen, 0, 0)
        splits = {split: output.finish() for split, output in outputs.items() if output.files}
    return ShardResult(
        splits=splits,
        records=reader.records if len(job.parts) == 1 else {},
        bad_records=reader.bad_records,
        empty_documents=reader.empty_documents,
        problems=tuple(reader.problems),
        unknown=unknown,
    )


class _Output:
    """The files of one split of a shard, in the making."""

    def __init__(self, job: ShardJob, split: str, tokenizer: Tokenizer) -> None:
        self._path = f"{job.prefix}.{split}"
        self._folder = job.folder
        self._begin = [] if tokenizer.bod is None else [tokenizer.bod]
        self._eod = tokenizer.eod
        self._writer = ShardWriter(job.folder / self._path, vocab_size=tokenizer.vocab_size)
        self._starts: list[int] = []
        self._records = array("I")
        self._text_bytes = 0
        self.files: list[str] = []

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *ended: Any) -> None:
        self._writer.__exit__(*ended)

    def add(self, text: Text, ids: np.ndarray) -> None:
        """Append a document between its begin-of-document token, where there is one, and its end-of-document token."""
        if self.files[-1:] != [text.document.file]:
            self.files.append(text.document.file)
            self._starts.append(len(self._records))
        self._records.append(text.document.record)
        self._text_bytes += text.bytes
        self._writer.add(np.concatenate([self._begin, ids, [self._eod]]) if self._begin else np.append(ids, self._eod))

    def finish(self) -> ShardEntry:
        """Make the files visible. -> the manifest's entry."""
        facts = self._writer.finish()
        content = pack_origins(self.files, self._starts, np.asarray(self._records, dtype=np.uint32))
        facts["origins"] = write_with_facts(self._folder / f"{self._path}.origins", content)
        return ShardEntry(
            path=self._path,
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
