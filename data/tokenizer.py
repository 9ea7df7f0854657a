"""Text to token ids and back; the only module that knows the `tokenizers` library.

A tokenizer is identified by a fingerprint of its content: shards remember it, and data prepared with another tokenizer
is refused. `token_bytes` says how many UTF-8 bytes each token stands for, so losses can be given in bits per byte.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.config import TokenizerConfig
from data.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
"""A trained tokenizer's file in the folder of prepared data."""


class Tokenizer:
    """A loaded tokenizer. Byte-level: any text can be encoded, and decoding gives it back exactly."""

    def __init__(self, backend: Backend, end_of_document: str) -> None:
        self._backend = backend
        eod = backend.token_to_id(end_of_document)
        if eod is None:
            raise DataError(
                f"the tokenizer has no token {end_of_document!r}. Set data.tokenizer.end_of_document to one it has."
            )
        self.eod: int = eod
        self.vocab_size: int = backend.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's content, independent of the file's formatting."""
        content = json.dumps(json.loads(self._backend.to_str()), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added; special tokens spelled out in the text are text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        return b"".join(self._bytes_of(int(i)) for i in ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int32 [vocab_size]; 0 for special tokens."""
        return np.array([len(self._bytes_of(i)) for i in range(self.vocab_size)], dtype=np.int32)

    def incremental_decoder(self) -> "IncrementalDecoder":
        """A decoder that takes ids one by one and gives text as soon as its characters are whole."""
        return IncrementalDecoder(self)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._backend.save(str(path))

    def _bytes_of(self, token: int) -> bytes:
        if token in self._backend.get_added_tokens_decoder():
            return b""
        piece = self._backend.id_to_token(token)
        if piece is None:
            raise DataError(f"token id {token} is not in the tokenizer's vocabulary of {self.vocab_size:,}.")
        return bytes(_BYTE_OF[character] for character in piece)


class IncrementalDecoder:
    """Bytes of tokens in, whole characters out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Text completed by `token`; may be empty in the middle of a character."""
        return self._utf8.decode(self._tokenizer._bytes_of(token))

    def finish(self) -> str:
        """What is left at the end, a broken character replaced."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens. The same texts give the same tokenizer.

    Raises DataError where the texts are too few for so many tokens.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.end_of_document],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    size = backend.get_vocab_size()
    if size != config.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size={config.vocab_size}, but these texts only give {size} tokens. Use more text, or "
            f"data.tokenizer.vocab_size={size}."
        )
    return Tokenizer(backend, config.end_of_document)


def load_tokenizer(path: Path, config: TokenizerConfig) -> Tokenizer:
    """Read a byte-level `tokenizer.json`. DataError where it cannot be read or is of another kind."""
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}. Set data.tokenizer.path to a tokenizer.json, or null to train one.")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every kind of bad file
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error
    if '"ByteLevel"' not in backend.to_str():
        raise DataError(f"{path} is not a byte-level tokenizer, so bytes per token are unknown. Use a byte-level one.")
    return Tokenizer(backend, config.end_of_document)


def _byte_alphabet() -> dict[str, int]:
    """The byte each character of a byte-level token stands for (GPT-2's table: printable bytes are themselves, the
    others take the code points from 256 on, in order)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
