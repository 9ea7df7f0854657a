"""Documents of a source, the policy for records that cannot be used, and the rule that splits train from held-out texts.

parts --Reader--> Document(text, file, record), in an order that depends on the files' names only
text --is_heldout--> whether it is for evaluation only. This is a function of seed and text: a text that occurs twice is
                     never in both splits, however files are named, ordered, cut or divided among sources
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from data.sources.files import file_size
from data.sources.parts import cut, limited, problem_of, read
from data.sources.records import Part
from recipes.schema.credentials import with_credentials
from recipes.schema.data import SourceConfig
from recipes.schema.errors import DataError

SHOWN_PROBLEMS = 3
"""Number of messages about bad records that are stored, to show some of them."""
_WHOLE = 1 << 62


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with the file and record it was read from."""

    text: str
    file: str
    record: int
    """Number of its record in the part it was read from, from 0."""


@dataclass
class Reader:
    """Reads parts of one source and counts the records that it leaves out."""

    name: str
    source: SourceConfig
    bad_records: int = 0
    empty_documents: int = 0
    problems: list[str] = field(default_factory=list)
    """The first messages about bad records."""
    records: dict[str, int] = field(default_factory=dict)
    """Records seen by file."""
    stored_bytes: int = 0
    """Stored bytes of the current part that were read so far."""

    @property
    def place(self) -> str:
        """Dotted key of the source in the recipe."""
        return f"data.sources.{self.name}"

    def documents(self, part: Part, *, first: int = 0) -> Iterator[Document]:
        """The documents of one part, from record `first` on. Empty texts are left out.

        Raises DataError for a file that cannot be read or whose size changed since the plan, and for a bad record unless
        the source's policy is to skip them.
        """
        if part.file_size and file_size(with_credentials(part.file, self.source.path)) != part.file_size:
            raise DataError(
                f"{part.file} ({self.place}) is no longer {part.file_size:,} bytes long: it changed while this data was "
                f"being prepared. Prepare into another data.folder."
            )
        self.stored_bytes = 0
        self.records.setdefault(part.file, 0)
        for record in read(self.place, self.source, part):
            self.stored_bytes = min(record.stored_bytes, part.size)
            self.records[part.file] += 1
            if record.number < first:
                continue
            if record.problem is not None:
                self.refuse(part, record.number, record.problem)
            elif not record.text:
                self.empty_documents += 1
            else:
                yield Document(record.text, part.file, record.number)

    def restart_counts(self) -> None:
        """Count bad records and empty documents from zero."""
        self.bad_records = self.empty_documents = 0
        self.problems = []

    def refuse(self, part: Part, number: int, problem: str) -> None:
        """Raise DataError for a record that cannot be used, or count it, as the source's `on_bad_record` says."""
        skip = self.source.on_bad_record == "skip"
        if not skip or len(self.problems) < SHOWN_PROBLEMS:
            message = problem_of(self.place, self.source, part, number, problem)
            if not skip:
                raise DataError(f"{message}. To leave such records out, set {self.place}.on_bad_record=skip.")
            self.problems.append(message)
        self.bad_records += 1


def documents(name: str, source: SourceConfig) -> Iterator[Document]:
    """All documents of one source, up to `max_bytes` of UTF-8 text. Raises DataError if the source is empty, and as Reader."""
    reader = Reader(name, source)
    count = 0
    for group in limited(reader.place, source, cut(reader.place, source, _WHOLE)):
        for part in group:
            for document in reader.documents(part):
                count += 1
                yield document
    if count == 0:
        raise DataError(
            f"data.sources.{name}.path={source.path} contains no text: every document is empty. Set another path."
        )


def digest(text: bytes, *, seed: int) -> str:
    """Digest of a text, as hex. The split of a text follows from it."""
    return hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little", signed=True)).hexdigest()


def is_heldout(text_digest: str, *, fraction: float) -> bool:
    """Whether the text of this digest is held out for evaluation."""
    return int(text_digest, 16) < fraction * 2**64


def cut_in_two(name: str, text: str, *, fraction: float) -> tuple[str, str]:
    """(train, held out) of a source that is a single document: cut at a line end. DataError for a single line.

    The beginning is held out. It stays held out if lines are added to the end later.
    """
    lines = text.splitlines(keepends=True)
    if len(lines) < 2:
        raise DataError(f"source {name!r} is a single line, so nothing can be held out. Give it more documents.")
    heldout_lines = min(len(lines) - 1, max(1, round(len(lines) * fraction)))
    return "".join(lines[heldout_lines:]), "".join(lines[:heldout_lines])


def first_of_each_split(
    name: str,
    source: SourceConfig,
    shards: Sequence[Sequence[Part]],
    *,
    seed: int,
    fraction: float,
    fixed_splits: Mapping[str, str],
) -> tuple[str, str]:
    """Digests of one text to hold out and one to train on, so that neither split of a source is empty.

    They are the first two different texts of the source, except texts whose split another source has already fixed.
    fixed_splits: {digest: split} of those texts. The second digest is empty if the source is a single document, which is
    then cut in two. DataError if it cannot be cut, if the source contains no text, or if other sources have put all of its
    texts into one split.
    """
    reader = Reader(name, source)
    found: dict[str, str] = {}
    seen: set[str] = set()
    count, last_text = 0, ""
    for group in shards:
        for part in group:
            for document in reader.documents(part):
                count += 1
                text_digest, last_text = digest(document.text.encode(), seed=seed), document.text
                seen.add(text_digest)
                split = fixed_splits.get(text_digest) or ("train" if "heldout" in found else "heldout")
                if text_digest not in found.values():
                    found.setdefault(split, text_digest)
                if len(found) == 2:
                    return found["heldout"], found["train"]
    if count == 0:
        raise DataError(
            f"{reader.place}.path={source.path} contains no text: every document is empty. Set another path."
        )
    if len(seen) > 1:
        full, empty = ("train", "held-out") if "train" in found else ("held-out", "train")
        raise DataError(
            f"source {name!r}: other sources have put all of its {len(seen):,} texts into the {full} split, so its {empty} split "
            f"is empty. Add texts that only this source has, or leave it out."
        )
    if count > 1:
        raise DataError(
            f"source {name!r} is one text {count} times, so nothing can be held out. Give it more documents."
        )
    cut_in_two(name, last_text, fraction=fraction)  # raises if it is a single line
    return seen.pop(), ""
