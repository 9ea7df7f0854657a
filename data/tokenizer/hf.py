"""`tokenizer.json` files, through the `tokenizers` library.

Every such file can be loaded. In most published files, and after training, it is a byte-level BPE whose merges follow the
order of its ids. Then tiktoken encodes in bulk, several times faster, if two conditions hold. `as_ranks` must show, token by
token, that the merges give the same ids. And both libraries, whose regular expressions read some patterns differently, must
give the same ids for the texts of `data.tokenizer.proof`. Otherwise `tokenizers` encodes in bulk, and `note` says so. While
tiktoken encodes, the beginning of one text in every million characters is encoded by both and compared.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from data.tokenizer.backend import Backend, Unencodable, check_ids
from data.tokenizer.proof import proof_texts
from data.tokenizer.ranks import PATTERNS, Ranks, encode_batch, encoding_of, from_oniguruma, portable
from recipes.schema.data import TokenizerConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable

FILE = "tokenizer.json"
_COMPARED_CHARACTERS = 2048
"""Of every _COMPARED_EVERY characters, this many are encoded by both libraries: about 1 % of the encoding time."""
_COMPARED_EVERY = 1 << 20
_MOST_GROWTH = 1000
_MOST_LOCKED = 4096
"""Characters of the longest text that is encoded with the interpreter lock held: a few milliseconds."""


class HuggingFace(Backend):
    """A loaded `tokenizer.json`."""

    file = FILE

    def __init__(self, library: Library, *, fast: bool = True) -> None:
        """fast: encode in bulk with tiktoken if it gives the same ids."""
        library.no_truncation()  # truncation and padding would silently change documents
        library.no_padding()
        library.encode_special_tokens = True  # the name of a special token in a text is ordinary text
        if isinstance(library.model, models.BPE):
            library.model.dropout = None  # with dropout, ids would be random
        self._library = library
        self.parsed: dict[str, Any] = json.loads(library.to_str())
        """The file's content."""
        vocab = library.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        self._tokens = {number: token for token, number in vocab.items()}
        added = self.parsed["added_tokens"]
        self.special = {entry["content"]: entry["id"] for entry in added if entry["special"]}
        self._added = {entry["id"]: b"" if entry["special"] else entry["content"].encode() for entry in added}
        self._kind = _kind_of_pieces(self.parsed)
        self.is_exact = self._kind == "bytes"
        self._prefix = str(self.parsed["model"].get("continuing_subword_prefix") or "")
        self._wants_fast = fast
        self._uncompared = _COMPARED_EVERY  # so that the first text is compared

    @functools.cached_property
    def ranks(self) -> Ranks | None:
        """The same tokenizer by ranks; None if `as_ranks` cannot show that they give the same ids."""
        return as_ranks(self.parsed)

    @functools.cached_property
    def _fast(self) -> Any:
        """tiktoken's encoder; None if it may not be used. See the top of this file."""
        if not self._wants_fast or self.ranks is None:
            return None
        try:
            fast = encoding_of(self.ranks)
        except DataError:  # only one of the two libraries understands the pattern
            return None
        texts = proof_texts(self.ranks.tokens)
        theirs = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return fast if all(fast.encode_ordinary(t) == e.ids for t, e in zip(texts, theirs, strict=True)) else None

    @property
    def note(self) -> str | None:
        """Why `tokenizers` encodes in bulk although the merges allow tiktoken; None otherwise."""
        if self._wants_fast and self.ranks is not None and self._fast is None:
            return (
                f"tiktoken and `tokenizers` read the pattern {self.ranks.pattern!r} differently, so `tokenizers` encodes texts, "
                f"several times slower."
            )
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        with _giving_up():
            if len(text) <= _MOST_LOCKED:
                return self._as_text(self._library.encode(text, add_special_tokens=False).ids)
            # The same ids; other threads run meanwhile, because only this function releases the interpreter lock.
            return self._as_text(self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Ids of several texts. DataError if the two libraries differ on the beginning of one."""
        if self._fast is not None:
            self._uncompared += sum(map(len, texts))
            if texts and self._uncompared >= _COMPARED_EVERY:
                self._uncompared = 0
                self._compare(texts[0][:_COMPARED_CHARACTERS])
            with contextlib.suppress(Unencodable):  # `tokenizers` may encode a text that tiktoken cannot
                return encode_batch(self._fast, texts, threads)
        with _giving_up():
            encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(self._as_text(each.ids), dtype=np.int64) for each in encoded]

    def _compare(self, text: str) -> None:
        if self._fast.encode_ordinary(text) != self.encode(text):
            raise DataError(
                f"tokenizers and tiktoken give different ids for the same text and vocabulary. Set "
                f"data.tokenizer.encoder=tokenizers, and please report the tokenizer.json with this text: {text!r}"
            )

    @functools.cached_property
    def keeps_bytes(self) -> bool:  # type: ignore[override]
        """Whether no step of the file drops or shortens anything: no normaliser, and a token for each byte."""
        pre, model = self.parsed["pre_tokenizer"] or {}, self.parsed["model"]
        steps = pre.get("pretokenizers", [pre])
        return (
            self.is_exact
            and self.parsed["normalizer"] is None
            and model["type"] == "BPE"
            and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
            and all(self._library.token_to_id(character) is not None for character in _BYTE_OF)
            and not any(entry["lstrip"] or entry["rstrip"] for entry in self.parsed["added_tokens"])
            and any(step.get("type") == "ByteLevel" for step in steps)
            and all(
                step.get("type") in ("ByteLevel", "Digits")
                or (step.get("type") == "Split" and step["behavior"] != "Removed")
                for step in steps
            )
        )

    @functools.cached_property
    def _spelled(self) -> dict[int, list[int]]:
        """{id of a special token: ids that spell its name as text}.

        Only special tokens that are also in the model's vocabulary, because the model finds these in a text. Not the unknown
        token, which also stands for unknown text.
        """
        vocab = self.parsed["model"]["vocab"]
        known = vocab if isinstance(vocab, dict) else {entry[0] for entry in vocab}
        return {
            number: self._letters(name)
            for name, number in self.special.items()
            if name in known and number != self.unknown
        }

    def _letters(self, name: str) -> list[int]:
        """Ids of a text, one character at a time. If the vocabulary can spell the text at all, it can do so by characters."""
        ids: list[int] = []
        for at, character in enumerate(name):
            if self._kind == "bytes":
                spelled = [_CHARACTER_OF[byte] for byte in character.encode()]
            else:
                spelled = [character if not at else self._prefix + character]
            found = [self._library.token_to_id(piece) for piece in spelled]
            if None in found and self.parsed["model"].get("byte_fallback"):
                found = [self._library.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
            known = (self.unknown if number is None else number for number in found)
            ids += [number for number in known if number is not None]
        return ids

    def _as_text(self, ids: list[int]) -> list[int]:
        """Ids without special tokens. If the model found the name of one in the text, its id is replaced by ids that spell it."""
        if not self._spelled or self._spelled.keys().isdisjoint(ids):
            return ids
        return [number for found in ids for number in self._spelled.get(found, (found,))]

    @functools.cached_property
    def template_begin(self) -> str | None:  # type: ignore[override]
        """Special token that the file's own template puts before a text."""
        encoded = self._library.encode("a", add_special_tokens=True)
        if not encoded.ids or not encoded.special_tokens_mask[0] or 0 not in encoded.special_tokens_mask:
            return None  # the template puts nothing before the text, or "a" has no token, so that the text's start is unknown
        return self._tokens[encoded.ids[0]]

    @functools.cached_property
    def unknown(self) -> int | None:  # type: ignore[override]
        """Id of the model's unknown token."""
        model = self.parsed["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        name = model.get("unk_token")
        number: int | None = self._library.token_to_id(name) if name is not None else None
        return number

    def image(self, text: str) -> str:
        """The text after the file's normaliser."""
        normal = self._library.normalizer
        if normal is not None:
            text = normal.normalize_str(text)
        return f" {text}" if self._puts_blank and not text[:1].isspace() else text

    @functools.cached_property
    def _puts_blank(self) -> bool:
        """Whether a byte-level file puts a blank before each text."""
        pre = self.parsed["pre_tokenizer"] or {}
        steps = pre.get("pretokenizers", [pre])
        return self.is_exact and any(step.get("type") == "ByteLevel" and step["add_prefix_space"] for step in steps)

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes of an id."""
        if token in self._added:
            return self._added[token]
        piece = self._tokens.get(token)
        if piece is None:
            if 0 <= token < self.vocab_size:
                return b""  # an unused id
            raise DataError(f"token id {token} is not in the tokenizer's vocabulary of {self.vocab_size:,}.")
        match self._kind:
            case "bytes":
                return bytes(_BYTE_OF[character] for character in piece)
            case "pieces":
                if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                    return bytes([int(piece[3:5], 16)])
                return piece.replace("▁", " ").encode()
            case _:
                text: str = self._library.decode([token], skip_special_tokens=True)
                return (
                    text.removeprefix(self._prefix).encode()
                    if self._prefix and piece != self._prefix
                    else text.encode()
                )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        if self._kind == "bytes":
            return super().decode(ids)
        text: str = self._library.decode([int(n) for n in ids], skip_special_tokens=True)
        return text

    def content(self) -> Any:
        """The ranks, if there are any, so that a tekken file with the same vocabulary is the same tokenizer. Otherwise the parts
        of the file that encoding uses."""
        if self.ranks is not None:
            return self.ranks.content()
        return {key: self.parsed[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._library.save(str(path))


@contextlib.contextmanager
def _giving_up() -> Iterator[None]:
    """Unencodable where the library's Rust code panics: a pattern of the file takes too many steps on a text. A panic is not an
    Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, DataError):
        raise
    except BaseException as error:
        raise Unencodable(
            f"cannot be cut into tokens: tokenizers gives up ({printable(str(error), most=200)})"
        ) from error


def load(path: Path, content: bytes, *, fast: bool = True) -> HuggingFace:
    """Read a `tokenizer.json`. path: for messages. DataError if it cannot be read."""
    try:
        parsed = json.loads(content)
        _check_special_tokens(parsed)
        _check_growth(parsed)
        tokenizer = HuggingFace(Library.from_buffer(content), fast=fast)
        tokenizer.encode("a")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's Rust code is not an Exception
        reason = printable(str(error), most=300).rstrip(".")
        raise DataError(
            f"{path} is not a tokenizer.json: {reason}. Set data.tokenizer.path to another file."
        ) from error


def _check_special_tokens(parsed: Any) -> None:
    """ValueError if a special token has the id of another token, because a document could then contain it. The library
    itself would silently give the special token a new id."""
    model, added = parsed["model"], parsed.get("added_tokens") or []
    vocab = model["vocab"]
    if not isinstance(vocab, dict):  # Unigram: a list of [piece, score]
        vocab = {entry[0]: number for number, entry in enumerate(vocab)}
    check_ids(vocab.values())
    check_ids(entry["id"] for entry in added)
    names = {number: token for token, number in vocab.items()}
    for entry in added:
        taken = names.setdefault(entry["id"], entry["content"])
        if taken != entry["content"]:
            raise ValueError(f"its added token {entry['content']!r} has the id {entry['id']} of the token {taken!r}")


def _check_growth(parsed: dict[str, Any]) -> None:
    """ValueError if the file's replacements can make a text _MOST_GROWTH times longer: nine steps that write ten letters for one
    turn a letter into gigabytes."""
    for part in ("normalizer", "decoder"):
        growth = _growth(parsed.get(part))
        if growth > _MOST_GROWTH:
            raise ValueError(f"its {part} can make a text {growth:,.0f} times longer; at most {_MOST_GROWTH} is taken")


def _growth(step: Any) -> float:
    """How many times longer one step of a normaliser or decoder can make a text."""
    match step:
        case {"type": "Sequence", "normalizers": inner} | {"type": "Sequence", "decoders": inner}:
            return math.prod(map(_growth, inner))
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if pattern:
            return max(1.0, len(content.encode()) / len(pattern.encode()))
        case {"type": "Replace", "content": content}:  # a regular expression may match single letters
            return 1.0 + len(content.encode())
    return 1.0


def train(texts: Iterable[str], config: TokenizerConfig) -> HuggingFace:
    """A byte-level BPE of exactly `vocab_size` tokens. The same texts give the same tokenizer.

    Raises DataError if the texts are too short for so many tokens.
    """
    library = Library(models.BPE())
    if config.pattern in (None, "gpt2"):
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        pattern = portable(PATTERNS.get(str(config.pattern), str(config.pattern)))
        try:
            cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"data.tokenizer.pattern={config.pattern!r} is neither a regular expression nor one of "
                f"{', '.join(PATTERNS)}: {error}. Use one of these, or correct it."
            ) from error
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])
    library.decoder = decoders.ByteLevel()
    special = {config.end_of_document: 0} | dict(config.special_tokens)
    if sorted(special.values()) != list(range(len(special))):
        raise DataError(
            f"the special tokens of a tokenizer to train must have the ids 0, 1, 2, ... without gaps, but they are "
            f"{', '.join(f'{k}={v}' for k, v in special.items())} ({config.end_of_document!r} is 0 unless it is "
            f"listed). Change the ids in data.tokenizer.special_tokens."
        )
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=sorted(special, key=lambda name: special[name]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    least = 256 + len(special)
    if config.vocab_size < least:
        raise DataError(
            f"data.tokenizer.vocab_size={config.vocab_size} is less than the 256 bytes and {len(special)} special tokens that "
            f"every byte-level tokenizer has. Use {least} or more."
        )
    library.train_from_iterator(texts, trainer)
    size = library.get_vocab_size()
    if size != config.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size={config.vocab_size}, but these texts only give {size} tokens. Use more text, or set "
            f"data.tokenizer.vocab_size={size}."
        )
    return HuggingFace(library, fast=config.encoder == "auto")


def as_ranks(parsed: dict[str, Any]) -> Ranks | None:
    """Ranks that give the same ids for every text as a `tokenizer.json`; None if this cannot be shown.

    BPE by merges joins the pair of neighbours that is first in the list of merges. BPE by ranks joins the pair whose union is
    the token of lowest rank. Both give the same ids under one condition: for every token t, when the bytes of t alone are joined
    by ranks, the last join is a listed merge, and these merges are listed in the order of their tokens' ids. Proof: the joins
    inside a range of bytes do not depend on the bytes around it until a join crosses its ends. So whenever two neighbours make
    up t, they are the two parts of the last join of t alone, and both ways make the same joins in the same order.
    """
    pattern = _pattern_of(parsed["pre_tokenizer"])
    model = parsed["model"]
    added = parsed["added_tokens"]
    plain = (
        pattern is not None
        and parsed["normalizer"] is None
        and model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and all(entry["special"] for entry in added)
    )
    if not plain or pattern is None:
        return None
    special = {entry["content"]: entry["id"] for entry in added}
    ordered = sorted((number, token) for token, number in model["vocab"].items() if token not in special)
    if not ordered or [number for number, _ in ordered] != list(range(ordered[0][0], ordered[0][0] + len(ordered))):
        return None
    if not all(set(token) <= _BYTE_OF.keys() for _, token in ordered):
        return None
    tokens = [bytes(_BYTE_OF[character] for character in token) for _, token in ordered]
    rank = {token: number for number, token in enumerate(tokens)}
    if len(rank) != len(tokens) or not all(bytes([byte]) in rank for byte in range(256)):
        return None
    listed: dict[tuple[bytes, bytes], int] = {}
    for number, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        listed[_bytes_of(left), _bytes_of(right)] = number
    if any(left + right not in rank for left, right in listed):
        return None
    before = -1
    for token in tokens:
        if len(token) == 1:
            continue
        pair = _last_pair(token, rank)
        number = listed.get(pair, -1) if pair else -1
        if number < before or number < 0:
            return None
        before = number
    return Ranks(tokens, ordered[0][0], pattern, special)


def as_parsed(ranks: Ranks) -> dict[str, Any]:
    """The content of a `tokenizer.json` that gives the same ids for every text as ranks. The inverse of `as_ranks`.

    DataError for a token that is not the union of two tokens, because no merge makes it.
    """
    rank = {token: number for number, token in enumerate(ranks.tokens)}
    merges = []
    for token in ranks.tokens:
        if len(token) > 1:
            pair = _last_pair(token, rank)
            if pair is None:
                raise DataError(
                    f"the token {token!r} cannot be written as merges, so there is no tokenizer.json for it."
                )
            merges.append([_piece_of(part) for part in pair])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": portable(ranks.pattern)}, "behavior": "Isolated", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(ranks.special.items(), key=lambda entry: entry[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **plain} for name, number in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": dict(special)
            | {_piece_of(token): ranks.offset + number for number, token in enumerate(ranks.tokens)},
            "merges": merges,
        },
    }


def _last_pair(token: bytes, rank: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts of the last join when the bytes of `token` are joined by ranks; None if they do not become the token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, best_at = None, -1
        for i in range(len(parts) - 1):
            found = rank.get(parts[i] + parts[i + 1])
            if found is not None and (best is None or found < best):
                best, best_at = found, i
        if best is None:
            return None
        parts[best_at : best_at + 2] = [parts[best_at] + parts[best_at + 1]]
    return parts[0], parts[1]


def _pattern_of(pre: dict[str, Any] | None) -> str | None:
    """The pattern of a byte-level pre-tokenizer; None for any other kind."""
    if pre is None:
        return None
    if pre["type"] == "ByteLevel" and not pre["add_prefix_space"] and pre.get("use_regex", True):
        return PATTERNS["gpt2"]
    if pre["type"] != "Sequence" or len(pre["pretokenizers"]) != 2:
        return None
    cut, whole = pre["pretokenizers"]
    if cut["type"] != "Split" or cut["behavior"] != "Isolated" or cut["invert"] or "Regex" not in cut["pattern"]:
        return None
    if whole["type"] != "ByteLevel" or whole["add_prefix_space"] or whole.get("use_regex", True):
        return None
    return from_oniguruma(str(cut["pattern"]["Regex"]))


def _kind_of_pieces(parsed: dict[str, Any]) -> str:
    """`bytes` (GPT-2's alphabet), `pieces` (SentencePiece's), or `words` (any other)."""
    text = json.dumps([parsed["pre_tokenizer"], parsed["decoder"]])
    if '"ByteLevel"' in text and all(set(token) <= _BYTE_OF.keys() for token in _sample(parsed)):
        return "bytes"
    return "pieces" if '"Metaspace"' in text or "▁" in text or parsed["model"].get("byte_fallback") else "words"


def _sample(parsed: dict[str, Any]) -> Iterable[str]:
    vocab = parsed["model"]["vocab"]
    special = {entry["content"] for entry in parsed["added_tokens"]}
    tokens = vocab if isinstance(vocab, dict) else [entry[0] for entry in vocab]
    return (token for token in tokens if token not in special)


def _byte_alphabet() -> dict[str, int]:
    """{character of a byte-level token: its byte}, by GPT-2's table. A printable byte is its own character; the others have the
    code points from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


def _piece_of(token: bytes) -> str:
    return "".join(_CHARACTER_OF[byte] for byte in token)


def _bytes_of(piece: str) -> bytes:
    return bytes(_BYTE_OF.get(character, 0) for character in piece)
