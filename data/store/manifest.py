"""The manifest of a folder of prepared data: sizes and digests of every file. It is written last.

    manifest.json
      tokenizer   file, sha256, fingerprint, vocabulary size, end-of-document id
      request     the recipe fields that the content depends on
      sources     by name: description, counts, and per split the list of shards in reading order
        shard     path (or an existing Megatron set, read in place), documents, tokens, dtype, bytes and sha256 of its files

A source's stream of tokens is its shards one after the other. The file and record of each document are stored next to the
shard (`data.store.origins`), not here, so that the manifest stays small for any number of documents.
"""

import functools
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data.system import disk
from data.system.bulk import without_collections
from recipes.schema.errors import DataError, refuse
from recipes.schema.facts import no_data_problem
from recipes.schema.foreign import printable, read_json

MANIFEST = "manifest.json"
FORMAT = 2
SPLITS = ("train", "heldout")
LARGEST_BYTES = 1 << 30
"""Limit for a manifest, which lists every shard."""
LARGEST_TOKENIZER_BYTES = 1 << 30
"""Limit for a tokenizer's file that is fetched."""
_OWN_FILES = (MANIFEST, "verified.json")
MASK = "mask"
"""Added to a shard's name: the set that says which of its tokens are learned."""
MASK_DTYPE = "uint8"
RANKS = "ranks"
"""Added to a shard's name: the set that says for each of its documents, answers of preferences, their rank and group."""
RANKS_DTYPE = "int16"
RANK_NUMBERS = 2
"""Numbers stored for an answer: its rank (0 is the best), and 1 if it is the first of its group, else 0."""
ITEMS = "items"
"""Added to a shard's name: the set that says for each of its documents which runs of placeholders stand for which media."""
ITEMS_DTYPE = "int64"
MEDIA = "media"
"""Added to a shard's name: the set of the original bytes of its media, a file each."""
MEDIA_DTYPE = "uint8"
_SETS = (MASK, RANKS, ITEMS, MEDIA)
DESCRIBED = {"chat": "chats", "preference": "preferences", "media": "media"}
"""By kind of source: the key of its counts in its description. Sources of text have none."""
_SUFFIXES = ("bin", "idx", "origins", *(f"{name}.{suffix}" for name in _SETS for suffix in ("bin", "idx")))
_INDEX_BYTES = 34 + 8, 4 + 8 + 8
"""Bytes of an index: at its beginning and end, and of each document (see `data.store.shards`)."""
_ID_TYPES = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_COUNT = 1 << 62
_LONGEST_NAME = 255
"""Bytes of a file name (NAME_MAX of Linux)."""


@dataclass(frozen=True)
class FileFacts:
    """Size and checksum of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard, or successive documents of one."""

    path: str
    """The shard's files without suffix: relative to the folder, or the absolute path of a set that is read in place."""
    documents: int
    tokens: int
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    dtype: str
    """Numpy's name of the type in which ids are stored (`uint16`)."""
    files: dict[str, FileFacts]
    """By suffix: `bin`, `idx`, `origins` (absent for a set read in place), of chats, preferences and media `mask.bin` and
    `mask.idx`, of preferences `ranks.bin` and `ranks.idx`, of media `items.bin`, `items.idx`, `media.bin` and `media.idx`."""
    first_document: int = 0
    """Index of this entry's first document in the shard. It is 0 except for a set read in place."""
    first_record: int = 0
    """Number of records of the file before the part that this shard was made of. Added to record numbers of its origins."""

    @property
    def mask(self) -> "ShardEntry | None":
        """The set that says which tokens are learned, as an entry of its own: the same documents, 1 or 0 for each token. None
        if all are."""
        return self._set(MASK, dtype=MASK_DTYPE, tokens=self.tokens)

    @property
    def ranks(self) -> "ShardEntry | None":
        """The set of its documents' ranks and groups, as an entry of its own: the same documents, `RANK_NUMBERS` numbers for
        each. None if they are not answers of preferences."""
        return self._set(RANKS, dtype=RANKS_DTYPE, tokens=RANK_NUMBERS * self.documents)

    @property
    def items(self) -> "ShardEntry | None":
        """The set of its documents' items (`data.media.items`), as an entry of its own. None without media."""
        if f"{ITEMS}.bin" not in self.files:
            return None
        return self._set(ITEMS, dtype=ITEMS_DTYPE, tokens=self.files[f"{ITEMS}.bin"].bytes // 8)

    @property
    def media(self) -> "ShardEntry | None":
        """The set of its media's bytes, as an entry of its own: a document is a file. None without media."""
        if f"{MEDIA}.bin" not in self.files:
            return None
        around, each = _INDEX_BYTES
        found = self._set(MEDIA, dtype=MEDIA_DTYPE, tokens=self.files[f"{MEDIA}.bin"].bytes)
        assert found is not None
        return replace(found, documents=(self.files[f"{MEDIA}.idx"].bytes - around) // each)

    def _set(self, name: str, *, dtype: str, tokens: int) -> "ShardEntry | None":
        if f"{name}.bin" not in self.files:
            return None
        files = {suffix: self.files[f"{name}.{suffix}"] for suffix in ("bin", "idx")}
        return replace(self, path=f"{self.path}.{name}", dtype=dtype, tokens=tokens, text_bytes=0, files=files)

    @property
    def token_files(self) -> list[str]:
        """Suffixes of the files that rows are read from."""
        return [suffix for suffix in self.files if suffix != "origins"]

    def prefix(self, folder: Path) -> Path:
        """The shard's files without suffix, for data prepared in `folder`."""
        return folder / self.path  # an absolute path replaces the folder

    def file(self, folder: Path, suffix: str) -> Path:
        """One file of the shard."""
        return Path(self.file_name(str(folder), suffix))

    def file_name(self, folder: str, suffix: str) -> str:
        """The same as a text, which is faster: a folder may have many thousands of files."""
        return f"{self.path}.{suffix}" if self.path.startswith("/") else f"{folder}/{self.path}.{suffix}"


@dataclass(frozen=True)
class SourceEntry:
    """One prepared source."""

    description: dict[str, Any]
    """Its input: path, format, number and bytes of its files."""
    splits: dict[str, list[ShardEntry]]
    """By split (`train`, `heldout`): shards in reading order, none empty."""
    bad_records: int = 0
    """Number of records left out because they could not be used (`on_bad_record: skip`)."""
    empty_documents: int = 0
    """Number of records left out because their text is empty."""

    def count(self, split: str, what: str) -> int:
        """Sum of `documents`, `tokens` or `text_bytes` over a split's shards."""
        return sum(getattr(entry, what) for entry in self.splits[split])


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that the ids belong to."""

    file: str
    """Name of its file in the folder."""
    sha256: str
    """Checksum of that file."""
    fingerprint: str
    """Digest of its vocabulary and rules. It does not depend on the format of the file."""
    vocab_size: int
    eod: int
    """Id of the end-of-document token, with which every document ends."""


@dataclass(frozen=True)
class Manifest:
    """The content of a folder of prepared data."""

    tokenizer: TokenizerEntry
    request: dict[str, Any]
    """The recipe fields that the content depends on."""
    sources: dict[str, SourceEntry] = field(default_factory=dict)
    format: int = FORMAT

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the content: the identity of this data."""
        # `vars` of each entry, not `asdict` of all: a tenth of the time.
        with without_collections():
            content = {each.name: getattr(self, each.name) for each in fields(self)}
            return hashlib.sha256(json.dumps(content, sort_keys=True, default=vars).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically. If it exists, the data is complete."""
    disk.write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=1), is_own=True)


def read_manifest(folder: Path, *, check_files: bool = True) -> Manifest:
    """The manifest of a folder. DataError if it is invalid, or if a file is missing or has another size.

    check_files=False: do not look at the files, because they are behind a URL.
    """
    path = folder / MANIFEST
    if not path.is_file():
        refuse([no_data_problem(folder)], DataError)
    try:
        with without_collections():
            manifest = _parsed(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = printable(str(error) if isinstance(error, ValueError) else repr(error), most=200)
        raise DataError(f"{path} cannot be read as a data manifest: {reason}. Prepare the data again.") from error
    for source in manifest.sources.values() if check_files else ():
        for entries in source.splits.values():
            for entry in entries:
                for suffix, facts in entry.files.items():
                    _check_size(entry.file_name(str(folder), suffix), facts)
    return manifest


def _parsed(path: Path) -> Manifest:
    raw = read_json(path, most_bytes=LARGEST_BYTES)
    if raw["format"] != FORMAT:
        raise DataError(
            f"{path} has format {raw['format']}; this version reads format {FORMAT}. Prepare the data again, into another "
            f"data.folder."
        )
    manifest = Manifest(
        tokenizer=TokenizerEntry(**raw["tokenizer"]),
        request=raw["request"],
        sources={name: source_entry(entry) for name, entry in raw["sources"].items()},
    )
    _check_content(manifest)
    return manifest


def source_entry(raw: dict[str, Any]) -> SourceEntry:
    """A SourceEntry from the result of `asdict`. TypeError or KeyError if it is something else."""
    splits = {split: [shard_entry(entry) for entry in raw["splits"][split]] for split in SPLITS}
    return SourceEntry(**(raw | {"splits": splits}))


def shard_entry(raw: dict[str, Any]) -> ShardEntry:
    """A ShardEntry from the result of `asdict`. TypeError or KeyError if it is something else."""
    return ShardEntry(**(raw | {"files": {suffix: FileFacts(**facts) for suffix, facts in raw["files"].items()}}))


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file on the disk."""
    return FileFacts(bytes=path.stat().st_size, sha256=file_sha256(path))


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_content(manifest: Manifest) -> None:
    """Raise ValueError for names, counts and digests that `write_manifest` never writes.

    A manifest behind a URL may be hostile, and local copies of its files get the names that it gives.
    """
    tokenizer = manifest.tokenizer
    if not _is_bare(tokenizer.file) or tokenizer.file in _OWN_FILES:
        raise ValueError(f"tokenizer.file={tokenizer.file!r} is not the bare name of a tokenizer's file")
    _check_digest(tokenizer.sha256, "tokenizer.sha256")
    _check_counts("tokenizer", vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
    if not isinstance(tokenizer.fingerprint, str) or not isinstance(manifest.request, dict):
        raise ValueError("tokenizer.fingerprint or request is of the wrong kind")
    for name, source in manifest.sources.items():
        if not _is_bare(name):
            raise ValueError(f"{name!r} is not the name of a source")
        if not isinstance(source.description, dict):
            raise ValueError(f"the description of {name!r} is not a mapping")
        _check_counts(name, bad_records=source.bad_records, empty_documents=source.empty_documents)
        for entry in (entry for split in SPLITS for entry in source.splits[split]):
            _check_entry(entry)


def _check_entry(entry: ShardEntry) -> None:
    path = entry.path
    if not isinstance(path, str) or not all(map(_is_bare, path.removeprefix("/").split("/"))):
        raise ValueError(f"{path!r} is not the path of a shard inside the folder")
    if entry.dtype not in _ID_TYPES:
        raise ValueError(f"{path!r}: ids are stored as {entry.dtype!r}, not one of {', '.join(_ID_TYPES)}")
    _check_counts(
        path,
        documents=entry.documents,
        tokens=entry.tokens,
        text_bytes=entry.text_bytes,
        first_document=entry.first_document,
        first_record=entry.first_record,
    )
    for name in _SETS:
        if (f"{name}.bin" in entry.files) != (f"{name}.idx" in entry.files):
            raise ValueError(f"{path!r} has one of the two files of its {name}")
    if f"{RANKS}.bin" in entry.files and f"{MASK}.bin" not in entry.files:
        raise ValueError(f"{path!r} has ranks of answers, but no mask that says which tokens are theirs")
    if len({f"{name}.bin" in entry.files for name in (ITEMS, MEDIA)}) > 1 or (
        f"{ITEMS}.bin" in entry.files and f"{MASK}.bin" not in entry.files
    ):
        raise ValueError(f"{path!r} has only some of the files of media: items, media and mask")
    for suffix, facts in entry.files.items():
        if suffix not in _SUFFIXES:
            raise ValueError(f"{path!r} has a file of unknown kind {suffix!r}")
        _check_counts(path, bytes=facts.bytes)
        _check_digest(facts.sha256, f"{path}.{suffix}")


def _is_bare(name: object) -> bool:
    """Whether a name is that of a file in a folder, not a path that leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    return name.isprintable() and len(name.encode(errors="replace")) <= _LONGEST_NAME


def _check_digest(digest: object, where: str) -> None:
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"{where}: {str(digest)[:80]!r} is not a sha256")


def _check_counts(where: str, **counts: object) -> None:
    for key, count in counts.items():
        if type(count) is not int or not 0 <= count <= _LARGEST_COUNT:
            raise ValueError(f"{where}: {key}={str(count)[:40]!r} is not a count")


def _check_size(path: str, facts: FileFacts) -> None:
    try:
        size: int | None = os.stat(path).st_size
    except OSError:
        size = None
    if size != facts.bytes:
        found = "missing" if size is None else f"{size:,} bytes long"
        raise DataError(f"{path} is {found}, but the manifest says {facts.bytes:,} bytes. Prepare the data again.")
