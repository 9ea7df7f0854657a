"""Converts text to token ids and back, with any of the usual kinds of tokenizer files.

    tokenizer.json     `tokenizers`; byte-level BPEs are encoded in bulk by tiktoken, with the same ids   (hf)
    *.model            SentencePiece                                                                     (pieces)
    *.tiktoken, tekken and rank-list .json    tiktoken                                                   (ranks)

A fingerprint of its content identifies a tokenizer, whatever the kind of file. Shards record it, and data prepared with
another tokenizer is refused. `token_bytes` gives the number of UTF-8 bytes of each token, so that losses can be given in bits
per byte.
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
"""Size of the largest tokenizer file that is read. Gemma's, one of the largest, has 34 MB."""

_MOST_SHORTENED = 4
"""How many times longer than its tokens a text is assumed to be at most. Unicode's NFC makes 3 bytes of 9 (Hangul)."""


class Tokenizer:
    """A loaded tokenizer. If it is byte-level, it encodes any text, and decoding returns exactly that text."""

    def __init__(
        self,
        backend: Backend,
        end_of_document: str,
        *,
        begin_of_document: str | None = None,
        known_fingerprint: str | None = None,
    ) -> None:
        """known_fingerprint: the fingerprint of this file from a manifest, which saves computing it."""
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
                f"the tokenizer has no special token {name!r}. Set data.tokenizer.{field} to one of its special tokens: "
                f"{some or '(it has none)'}."
            )
        return special[name]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's content. It does not depend on the kind and formatting of the file."""
        return self._known_fingerprint or fingerprint(self._backend)

    @property
    def special(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return dict(self._backend.special)

    @property
    def file(self) -> str:
        """Name of its file in a folder of prepared data."""
        return self._backend.file

    @property
    def template_begin(self) -> str | None:
        """Special token that the file's own template puts before a text (`<bos>` of Gemma and Llama); None if it puts none.

        A recipe that continues training a model with this tokenizer needs it as `data.tokenizer.begin_of_document`.
        """
        return self._backend.template_begin

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. The name of a special token in the text is encoded as ordinary text.

        DataError if the text cannot be encoded.
        """
        try:
            return self._backend.encode(text)
        except Unencodable as error:
            raise DataError(f"The text {printable(text, most=60)!r} {error}") from error

    def encode_batch(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]:
        """Ids of several texts: the same as from `encode`, but faster."""
        return self._backend.encode_batch(texts, threads)

    def loss(self, text: str, ids: np.ndarray) -> str | None:
        """What ids lose of their text, as a message; None if they lose nothing.

        The ids of a byte-level tokenizer must have exactly the bytes of the text, or of the text after the file's normaliser.
        Those of any other must have at least as many bytes as the normalised text, without counting blanks. A text with the
        unknown token is not checked.
        """
        backend = self._backend
        if backend.is_exact:
            expected = len(text.encode()) if type(backend).image is Backend.image else len(backend.image(text).encode())
            lost = expected - int(self.token_bytes()[ids].sum())
        else:
            if backend.unknown is not None and (ids == backend.unknown).any():
                return None
            expected = len("".join(backend.image(text).replace("▁", " ").split()).encode())
            lost = expected - int(self._solid_bytes[ids].sum())
            lost = max(0, lost)
        if not lost:
            return None
        decoded, image = self.decode(ids), backend.image(text)
        at = next((i for i, (a, b) in enumerate(zip(decoded, image, strict=False)) if a != b), len(decoded))
        what = f"loses {lost:,}" if lost > 0 else f"gains {-lost:,}"
        return (
            f"{what} of its {expected:,} bytes when it is encoded, the first near {image[max(0, at - 8) : at + 8]!r}, because "
            f"the tokenizer has no token for them"
        )

    def unknown_count(self, ids: np.ndarray) -> int:
        """Number of unknown tokens among the ids."""
        unknown = self._backend.unknown
        return 0 if unknown is None else int((ids == unknown).sum())

    @property
    def note(self) -> str | None:
        """What the user should know about how texts are encoded with this file. The first call may take a second."""
        notes = [self._backend.note]
        begin = self.template_begin
        if begin is not None and self.bod is None:
            notes.append(
                f"The tokenizer's own template puts {begin!r} before a text, but data.tokenizer.begin_of_document is null, so "
                f"documents do not begin with it. To continue a model that was trained with it, set "
                f"data.tokenizer.begin_of_document={begin!r}."
            )
        return " ".join(filter(None, notes)) or None

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to continue. They begin with the begin-of-document token, if there is one.

        Of an empty text without such a token: the end-of-document token, which the model saw before each document.
        """
        begin = [] if self.bod is None else [self.bod]
        return begin + self.encode(text) or [self.eod]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
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
        """Number of UTF-8 bytes of each id, int32 [vocab_size]; 0 for special tokens."""
        return self._token_bytes

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        sizes = np.array([len(self._backend.bytes_of(i)) for i in range(self.vocab_size)], dtype=np.int32)
        sizes.flags.writeable = False
        return sizes

    @functools.cached_property
    def most_bytes_per_token(self) -> int:
        """A text of n tokens has at most n times as many UTF-8 bytes.

        This holds for every text if the tokenizer keeps all bytes. Others may drop blanks, or give one token for many unknown
        letters. For these it is _MOST_SHORTENED times the longest token: a limit that ordinary texts do not reach.
        """
        longest = max(1, int(self.token_bytes().max(initial=0)))
        return longest if self._backend.keeps_bytes else _MOST_SHORTENED * longest

    @functools.cached_property
    def _solid_bytes(self) -> np.ndarray:
        """`token_bytes` without blanks."""
        return np.array(
            [len(b"".join(self._backend.bytes_of(i).split())) for i in range(self.vocab_size)], dtype=np.int32
        )

    def incremental_decoder(self) -> "IncrementalDecoder":
        """A decoder that takes ids one by one and returns text as soon as its characters are complete."""
        return IncrementalDecoder(self._backend)

    def parsed(self) -> dict[str, Any] | None:
        """Content of a `tokenizer.json` with the same ids for every text; None if no such conversion is known.

        DataError names what a `tokenizer.json` cannot represent: ranks that no merge makes, rules of SentencePiece.
        """
        match self._backend:
            case hf.HuggingFace():
                return self._backend.parsed
            case ranks.Tiktoken():
                return hf.as_parsed(self._backend.ranks)
            case _:
                return self._backend.tokenizer_json()

    def save(self, path: Path) -> None:
        """Write a file that `load_tokenizer` reads."""
        self._backend.save(path)


class IncrementalDecoder:
    """Takes tokens and returns complete characters."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes. It is empty in the middle of a character."""
        return self._utf8.decode(self._backend.bytes_of(token))

    def finish(self) -> str:
        """The rest at the end: an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens. The same texts give the same tokenizer.

    Raises DataError if the texts are too short for so many tokens.
    """
    return Tokenizer(hf.train(texts, config), config.end_of_document, begin_of_document=config.begin_of_document)


def load_tokenizer(path: Path, config: TokenizerConfig, *, known_fingerprint: str | None = None) -> Tokenizer:
    """Read a tokenizer of any kind. DataError if it cannot be read, or has no end-of-document token."""
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
        content = read_bounded(path, most_bytes=LARGEST_BYTES).removeprefix(codecs.BOM_UTF8)
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
            raise DataError(f"{path} is not JSON: {error}. Set data.tokenizer.path to a tokenizer file.") from error
        if isinstance(parsed, dict) and "model" in parsed:
            return hf.load(path, content, fast=config.encoder == "auto")
    return ranks.Tiktoken(ranks.load(path, content, config))
