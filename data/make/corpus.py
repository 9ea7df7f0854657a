"""Documents of a source, with the policy for records that cannot be used, and the rule that holds some back.

parts --Reader--> Document(text, file, record), in an order that depends on the files' names only
text --held_out--> whether it is kept for evaluation: a function of seed and text, so that a text that comes twice is
                   never in both splits, however files are named, ordered, cut or shared among sources
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
"""Messages of bad records that are kept to be shown."""
_WHOLE = 1 << 62


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it came from."""

    text: str
    file: str
    record: int
    """Number of its record in the part it was read from, from 0."""


@dataclass
class Reader:
    """Reads parts of one source and keeps count of what it leaves out."""

    name: str
    source: SourceConfig
    bad_records: int = 0
    empty_documents: int = 0
    problems: list[str] = field(default_factory=list)
    """The first messages about bad records."""
    records: dict[str, int] = field(default_factory=dict)
    """Records seen by file."""
    stored_bytes: int = 0
    """Of the current part, read so far."""

    @property
    def place(self) -> str:
        """Dotted place of the source in the recipe."""
        return f"data.sources.{self.name}"

    def documents(self, part: Part, *, first: int = 0) -> Iterator[Document]:
        """The documents of one part, from record `first` on. Empty texts are left out.

        Raises DataError for a file that cannot be read or is not the one planned with, and for a bad record unless the
        source's policy is to skip them.
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
        """Stop at, or count, a record that cannot be used."""
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
        raise DataError(f"data.sources.{name}.path={source.path} holds no text: every document is empty.")


def digest(text: bytes, *, seed: int) -> str:
    """Digest of a text; the split of a text follows from it."""
    return hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little", signed=True)).hexdigest()


def held_out(known: str, *, fraction: float) -> bool:
    """Whether the text of this digest is kept for evaluation."""
    return int(known, 16) < fraction * 2**64


def cut_in_two(name: str, text: str, *, fraction: float) -> tuple[str, str]:
    """(train, held out) of a source that is a single document: cut at a line end. DataError for a single line.

    The beginning is held out: lines added to the end later leave it held out.
    """
    lines = text.splitlines(keepends=True)
    if len(lines) < 2:
        raise DataError(f"source {name!r} is a single line, so nothing can be held out. Give it more documents.")
    held = min(len(lines) - 1, max(1, round(len(lines) * fraction)))
    return "".join(lines[held:]), "".join(lines[:held])


def first_two(
    name: str,
    source: SourceConfig,
    shards: Sequence[Sequence[Part]],
    *,
    seed: int,
    fraction: float,
    dealt: Mapping[str, str],
) -> tuple[str, str]:
    """Digests of a text that is held out and one that is trained on, so that neither split of a source is empty: the first
    two different texts, but for those whose split another source has decided.

    dealt: split by digest, of texts that other sources decided. The second digest is empty if the source is a single
    document, which can be cut in two. DataError if it cannot, if there is no
    text, or if other sources have put all of it into one split.
    """
    reader = Reader(name, source)
    found: dict[str, str] = {}
    seen: set[str] = set()
    count, only = 0, ""
    for group in shards:
        for part in group:
            for document in reader.documents(part):
                count += 1
                known, only = digest(document.text.encode(), seed=seed), document.text
                seen.add(known)
                split = dealt.get(known) or ("train" if "heldout" in found else "heldout")
                if known not in found.values():
                    found.setdefault(split, known)
                if len(found) == 2:
                    return found["heldout"], found["train"]
    if count == 0:
        raise DataError(f"{reader.place}.path={source.path} holds no text: every document is empty.")
    if len(seen) > 1:
        there, lacking = ("train", "held out") if "train" in found else ("held out", "trained on")
        raise DataError(
            f"source {name!r}: other sources have all of its {len(seen):,} texts in the {there} split, so none can be {lacking}. "
            f"Give it texts of its own, or leave it out."
        )
    if count > 1:
        raise DataError(
            f"source {name!r} is one text {count} times, so nothing can be held out. Give it more documents."
        )
    cut_in_two(name, only, fraction=fraction)  # it can be
    return seen.pop(), ""
