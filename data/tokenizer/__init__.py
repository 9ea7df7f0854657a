"""Text to token ids and back, from any of the usual tokenizer files.

    tokenizer.json     `tokenizers`; byte-level BPEs are encoded in bulk by tiktoken, with the same ids   (hf)
    *.model            SentencePiece                                                                     (pieces)
    *.tiktoken, tekken and rank-list .json    tiktoken                                                   (ranks)

A tokenizer is identified by a fingerprint of its content, for every kind of file: shards record it, and data prepared
with another tokenizer is refused. `token_bytes` says how many UTF-8 bytes each token stands for, so losses can be given in
bits per byte.
"""

import codecs
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import hf, ranks
from data.tokenizer.backend import Backend, fingerprint
from data.tokenizer.backend import Unencodable as Unencodable
from recipes.schema.data import TokenizerConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import parse_json, printable, read_bounded

LARGEST_BYTES = 256 << 20
"""Bytes of the largest tokenizer file that is read; Gemma's, one of the largest, has 34 MB."""


class Tokenizer:
    """A loaded tokenizer. A byte-level one encodes any text, and decoding gives it back exactly."""

    def __init__(
        self,
        backend: Backend,
        end_of_document: str,
        *,
        begin_of_document: str | None = None,
        known_fingerprint: str | None = None,
    ) -> None:
        """known_fingerprint: what a manifest says of this very file, so that it need not be computed again."""
        self._backend = backend
        self.eod: int = self._special_id("end_of_document", end_of_document)
        self.bod: int | None = None
        """Id of the token before every document; None without one."""
        if begin_of_document is not None:
            self.bod = self._special_id("begin_of_document", begin_of_document)
        self.vocab_size: int = backend.vocab_size
        self._known_fingerprint = known_fingerprint

    def _special_id(self, field: str, name: str) -> int:
        special = self._backend.special
        if name not in special:
            names = list(special)
            some = ", ".join(printable(known, most=60) for known in names[:12]) + (
                f", ... ({len(names):,} in all)" if len(names) > 12 else ""
            )
            raise DataError(
                f"the tokenizer has no special token {name!r}. Set data.tokenizer.{field} to one it has: {some or 'it has none'}."
            )
        return special[name]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's content; the kind and formatting of the file do not matter."""
        return self._known_fingerprint or fingerprint(self._backend)

    @property
    def special(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return dict(self._backend.special)

    @property
    def file(self) -> str:
        """Name its file has in a folder of prepared data."""
        return self._backend.file

    @property
    def template_begin(self) -> str | None:
        """Special token that the file's own template puts before a text (`<bos>` of Gemma and Llama); None without one.

        The value for `data.tokenizer.begin_of_document` of a recipe that continues a model with this tokenizer.
        """
        return self._backend.template_begin

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added; special tokens spelled out in the text are text. DataError if it cannot be
        encoded."""
        try:
            return self._backend.encode(text)
        except Unencodable as error:
            raise DataError(f"The text {printable(text, most=60)!r} {error}") from error

    def encode_batch(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]:
        """Ids of several texts, the same as `encode` gives, faster."""
        return self._backend.encode_batch(texts, threads)

    def loss(self, text: str, ids: np.ndarray) -> str | None:
        """The part of a text that its ids do not give back, as a message. None if they stand for all of it.

        A byte-level tokenizer must give back the text, or what its own normaliser makes of it, to the byte. Any other must give
        back as many bytes as the normalised text has, blanks not counted; a text with the unknown token is not checked.
        """
        backend = self._backend
        if backend.is_exact:
            wanted = len(text.encode()) if type(backend).image is Backend.image else len(backend.image(text).encode())
            lost = wanted - int(self.token_bytes()[ids].sum())
        else:
            if backend.unknown is not None and (ids == backend.unknown).any():
                return None
            wanted = len("".join(backend.image(text).replace("▁", " ").split()).encode())
            lost = wanted - int(self._solid_bytes[ids].sum())
            lost = max(0, lost)
        if not lost:
            return None
        there, image = self.decode(ids), backend.image(text)
        at = next((i for i, (a, b) in enumerate(zip(there, image, strict=False)) if a != b), len(there))
        what = f"loses {lost:,}" if lost > 0 else f"gains {-lost:,}"
        return (
            f"{what} of its {wanted:,} bytes when it is encoded, the first near {image[max(0, at - 8) : at + 8]!r}: the "
            f"tokenizer has no token for them"
        )

    def unknown_count(self, ids: np.ndarray) -> int:
        """How many of the ids are the unknown token."""
        unknown = self._backend.unknown
        return 0 if unknown is None else int((ids == unknown).sum())

    @property
    def note(self) -> str | None:
        """What the user should know about how texts are encoded with this file. Asking may take a second."""
        notes = [self._backend.note]
        begin = self.template_begin
        if begin is not None and self.bod is None:
            notes.append(
                f"The tokenizer's own template puts {begin!r} before a text, and data.tokenizer.begin_of_document is null, so it "
                f"is not written. To continue a model that was trained with it, set data.tokenizer.begin_of_document={begin!r}."
            )
        return " ".join(filter(None, notes)) or None

    def prompt(self, text: str) -> list[int]:
        """Ids that a continuation of a text begins with: after the token that begins a document, or ends the one before."""
        begin = [] if self.bod is None else [self.bod]
        return begin + self.encode(text) or [self.eod]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        return self._backend.decode([int(i) for i in ids])

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names."""
        special = {id: name for name, id in self._backend.special.items()}
        runs = itertools.groupby(ids, key=lambda id: int(id) in special)
        return "".join("".join(special[int(i)] for i in run) if named else self.decode(run) for named, run in runs)

    def bytes_of(self, id: int) -> bytes:
        """UTF-8 bytes of one token; empty for special tokens."""
        return self._backend.bytes_of(id)

    def special_name(self, id: int) -> str | None:
        """Name of a special token; None if the id is an ordinary one."""
        return next((name for name, special in self._backend.special.items() if special == id), None)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int32 [vocab_size]; 0 for special tokens."""
        return self._token_bytes

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        sizes = np.array([len(self._backend.bytes_of(i)) for i in range(self.vocab_size)], dtype=np.int32)
        sizes.flags.writeable = False
        return sizes

    @functools.cached_property
    def _solid_bytes(self) -> np.ndarray:
        """The same without blanks."""
        return np.array(
            [len(b"".join(self._backend.bytes_of(i).split())) for i in range(self.vocab_size)], dtype=np.int32
        )

    def incremental_decoder(self) -> "IncrementalDecoder":
        """A decoder that takes ids one by one and gives text as soon as its characters are whole."""
        return IncrementalDecoder(self._backend)

    def parsed(self) -> dict[str, Any] | None:
        """Content of a `tokenizer.json` with the same ids for every text; None if no such conversion is known.

        DataError says what a `tokenizer.json` cannot represent: ranks that merges cannot reach, rules of SentencePiece.
        """
        match self._backend:
            case hf.HuggingFace():
                return self._backend.parsed
            case ranks.Tiktoken():
                return hf.as_parsed(self._backend.ranks)
            case _:
                return self._backend.tokenizer_json()

    def content(self) -> Any:
        """What the fingerprint is made of."""
        return self._backend.content()

    def save(self, path: Path) -> None:
        """Write a file that `load_tokenizer` reads."""
        self._backend.save(path)


class IncrementalDecoder:
    """Bytes of tokens in, whole characters out."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Text completed by `token`; may be empty in the middle of a character."""
        return self._utf8.decode(self._backend.bytes_of(token))

    def finish(self) -> str:
        """What is left at the end, a broken character replaced."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens. The same texts give the same tokenizer.

    Raises DataError if the texts are too few for so many tokens.
    """
    return Tokenizer(hf.train(texts, config), config.end_of_document, begin_of_document=config.begin_of_document)


def load_tokenizer(path: Path, config: TokenizerConfig, *, known_fingerprint: str | None = None) -> Tokenizer:
    """Read a tokenizer of any kind. DataError if it cannot be read, or lacks the end-of-document token."""
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}. Set data.tokenizer.path to a file, or null to train one.")
    return Tokenizer(
        _backend(path, config),
        config.end_of_document,
        begin_of_document=config.begin_of_document,
        known_fingerprint=known_fingerprint,
    )


def _backend(path: Path, config: TokenizerConfig) -> Backend:
    try:
        content = read_bounded(path, most_bytes=LARGEST_BYTES)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {printable(str(error.strerror or error))}. Set data.tokenizer.path to another file."
        ) from error
    if ".model" in path.name:
        from data.tokenizer.pieces import SentencePiece  # only such files need the sentencepiece package

        return SentencePiece(path, content)
    if path.suffix == ".json":
        try:
            parsed = parse_json(content)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if isinstance(parsed, dict) and "model" in parsed:
            return hf.load(path, content, fast=config.encoder == "auto")
    return ranks.Tiktoken(ranks.load(path, content, config))
