"""Byte-level BPE by ranks: tiktoken's and tekken's files, encoded by tiktoken.

Ranks are tokens (byte strings) in the order in which they are merged. `offset` is the id of rank 0. `pattern` is the regular
expression that first cuts a text into pieces. There are three kinds of files:

    *.tiktoken        one line per token, base64 and rank. It contains no pattern and no special tokens
    tekken .json      Mistral's: `config`, `vocab`, `special_tokens`
    rank list .json   a list of {rank, token_bytes, token_str}, as Megatron-LM and Nemotron use it, and nothing else

What a file does not contain comes from `data.tokenizer` of the recipe: pattern, rank_offset, special_tokens.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from data.tokenizer.backend import Backend, Unencodable, check_ids
from recipes.schema.data import TokenizerConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import printable

FILE = "tokenizer.ranks.json"
_FORMAT = "stratum-ranks-1"
_MOST_SPECIAL = 100_000
"""Limit for the special tokens of a tekken file. Published ones have 1,000."""
_COUNTED = re.compile(r"(\{\d+(?:,\d*)?\})\+")
"""A counted repetition with a plus: `{1,3}+`. The two libraries read it differently, see `portable`."""
_ATOM = re.compile(
    r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.|\[(?:\[:[^\]]*:\]|\\.|\[[^\]]*\]|\^?\]?[^\]\\\[])*\]|.", re.DOTALL
)
"""One character of a regular expression, or an escape or a class as a whole."""
_TEKKEN_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                   "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                   "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")  # fmt: skip
"""Names of the first ids in tekken files that give no names (mistral-common, Tekkenizer, files up to version 7)."""

_CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": _CL100K,
    "o200k": f"{_CASED}{_SHORT}|{_UPPER}{_SHORT}|" + r"\p{N}{1,3}|" + _REST,
    "nemotron": f"{_CASED}|{_UPPER}|" + r"\p{N}|" + _REST,
}
"""Published patterns by name: GPT-2's, OpenAI's two (tiktoken_ext/openai_public.py), and that of tekken files, which is also
Megatron-LM's `v2` and Nemotron's. cl100k is published with `\\p{N}{1,3}+`. In tiktoken's regular expressions this means the
same as here; in those of `tokenizers` it means any number of digits."""


@dataclass(frozen=True)
class Ranks:
    """A byte-level BPE by its ranks."""

    tokens: list[bytes]
    """In the order of ranks. Every single byte is among them."""
    offset: int
    pattern: str
    special: Mapping[str, int]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.offset + len(self.tokens), 1 + max(self.special.values(), default=-1))

    def content(self) -> Any:
        """Everything that decides the ids."""
        digest = hashlib.sha256()
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return {
            "model": "byte-level BPE by ranks",
            "pattern": portable(self.pattern),
            "offset": self.offset,
            "tokens": digest.hexdigest(),
            "special": dict(self.special),
        }


class Tiktoken(Backend):
    """Ranks, encoded by tiktoken."""

    file = FILE

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.vocab_size = ranks.vocab_size
        self.special = ranks.special
        self._names = {number: name for name, number in ranks.special.items()}
        self._encoding = encoding_of(ranks)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return encode_batch(self._encoding, [text], 1)[0].tolist()

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Ids of several texts. tiktoken releases Python's lock, so threads help."""
        return encode_batch(self._encoding, texts, threads)

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes of an id. DataError outside the vocabulary."""
        if token in self._names:
            return b""
        rank = token - self.ranks.offset
        if not 0 <= rank < len(self.ranks.tokens):
            if 0 <= token < self.vocab_size:
                return b""  # an id that no token has
            raise DataError(f"token id {token} is not in the tokenizer's vocabulary of {self.vocab_size:,}.")
        return self.ranks.tokens[rank]

    def content(self) -> Any:
        """The ranks."""
        return self.ranks.content()

    def save(self, path: Path) -> None:
        """Write a JSON file in this project's own format, with pattern and special tokens."""
        tokens = [base64.b64encode(token).decode() for token in self.ranks.tokens]
        content = {
            "format": _FORMAT,
            "pattern": self.ranks.pattern,
            "offset": self.ranks.offset,
            "special": dict(self.ranks.special),
            "tokens": tokens,
        }
        path.write_text(json.dumps(content, indent=0))


def portable(pattern: str) -> str:
    """Rewrite a pattern for tiktoken so that `tokenizers` matches the same texts.

    In Rust's regular expressions, `X{1,3}+` is possessive: it matches 1 to 3 times and gives nothing back. In Oniguruma, the
    plus repeats the whole.
    """
    return _each_counted(pattern, lambda atom, count, is_last: f"{atom}{count}" if is_last else f"(?>{atom}{count})")


def from_oniguruma(pattern: str) -> str:
    """Rewrite a pattern for `tokenizers` so that tiktoken matches the same texts (see `portable`)."""
    return _each_counted(pattern, lambda atom, count, is_last: f"(?:{atom}{count})+")


def _each_counted(pattern: str, write: Callable[[str, str, bool], str]) -> str:
    """A pattern with each `atom{n,m}+` replaced by write(atom, count, whether its alternative ends there)."""
    out: list[str] = []
    opened: list[int] = []
    atom, at = 0, 0  # index in `out` at which the last atom begins; index in the pattern
    while at < len(pattern):
        counted = _COUNTED.match(pattern, at)
        if counted and out:
            at = counted.end()
            is_last = not opened and (at == len(pattern) or pattern[at] == "|")
            out[atom:] = [write("".join(out[atom:]), counted[1], is_last)]
            continue
        piece = _ATOM.match(pattern, at)
        assert piece is not None, "any character is an atom"
        match piece[0]:
            case "(":
                opened.append(len(out))
                atom = len(out)
            case ")" if opened:
                atom = opened.pop()
            case "?" | "*" | "+" | "|":
                pass
            case _:
                atom = len(out)
        out.append(piece[0])
        at = piece.end()
    return "".join(out)


def encoding_of(ranks: Ranks) -> tiktoken.Encoding:
    """tiktoken's encoder. DataError for ranks that would crash it.

    Text that the pattern does not match becomes a piece of its own, as in `tokenizers`. tiktoken would leave it out.
    """
    if len(set(ranks.tokens)) != len(ranks.tokens):
        raise DataError("the tokenizer has the same token twice. Set data.tokenizer.path to another file.")
    lacking = {bytes([byte]) for byte in range(256)} - set(ranks.tokens)
    if lacking:
        raise DataError(
            f"the tokenizer has no token for {len(lacking)} of the 256 bytes, e.g. {min(lacking)!r}. Set data.tokenizer.path to "
            f"another file."
        )
    try:
        return tiktoken.Encoding(
            name="stratum",
            pat_str=f"{ranks.pattern}|(?:(?!{ranks.pattern})(?s:.))+",
            mergeable_ranks={token: ranks.offset + rank for rank, token in enumerate(ranks.tokens)},
            special_tokens=dict(ranks.special),
        )
    except ValueError as error:
        raise DataError(
            f"tiktoken cannot read the tokenizer's pattern {ranks.pattern!r}: {error}. Set data.tokenizer.pattern to one of "
            f"{', '.join(PATTERNS)}."
        ) from error


def encode_batch(encoding: tiktoken.Encoding, texts: list[str], threads: int) -> list[np.ndarray]:
    """Ids of several texts."""

    def encode(text: str) -> np.ndarray:
        try:
            return encoding.encode_to_numpy(text, disallowed_special=())
        except (
            ValueError
        ) as error:  # its regular expressions have a limit: e.g. hundreds of thousands of successive blanks
            raise Unencodable(f"cannot be cut into tokens: tiktoken gives up ({error})") from error

    if threads == 1 or len(texts) == 1:
        return [encode(text) for text in texts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(encode, texts))


def load(path: Path, content: bytes, config: TokenizerConfig) -> Ranks:
    """Ranks of any of the three kinds of files. path: for messages. DataError for another kind of file, and for a missing
    pattern."""
    try:
        if path.suffix == ".json":
            parsed = json.loads(content)
            if isinstance(parsed, dict) and parsed.get("format") == _FORMAT:
                tokens = [base64.b64decode(token) for token in parsed["tokens"]]
                return _checked(Ranks(tokens, parsed["offset"], parsed["pattern"], parsed["special"]))
            if isinstance(parsed, dict):
                return _tekken(parsed, config)
            pairs = [(row["rank"], base64.b64decode(row["token_bytes"])) for row in parsed]
            return _completed(_in_order(pairs), config, path)
        lines = (line.split() for line in content.splitlines() if line)
        pairs = sorted((int(rank), base64.b64decode(token)) for token, rank in lines)
        return _completed(_in_order(pairs), config, path)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = printable(str(error) if type(error) is ValueError else repr(error), most=300)
        raise DataError(
            f"{path} is not a tiktoken or tekken file: {why.rstrip('.')}. Set data.tokenizer.path to another file."
        ) from error


def _checked(ranks: Ranks) -> Ranks:
    """The same ranks. ValueError if a special token has the id of an ordinary one, or the pattern is not text."""
    check_ids([ranks.offset, *ranks.special.values()])
    for name, number in ranks.special.items():
        if 0 <= number - ranks.offset < len(ranks.tokens):
            raise ValueError(f"its special token {name!r} has the id {number} of an ordinary token")
    if not isinstance(ranks.pattern, str):
        raise ValueError(f"its pattern is {ranks.pattern!r}, not text")
    return ranks


def _tekken(parsed: dict[str, Any], config: TokenizerConfig) -> Ranks:
    settings = parsed["config"]
    offset = settings["default_num_special_tokens"]
    if not isinstance(offset, int) or not 0 <= offset <= _MOST_SPECIAL:
        raise ValueError(f"default_num_special_tokens={offset!r} is not an integer from 0 to {_MOST_SPECIAL:,}")
    size = config.keep_vocab or settings["default_vocab_size"]
    given = parsed.get("special_tokens")
    names = {entry["token_str"]: entry["rank"] for entry in given} if given else _numbered(_TEKKEN_SPECIAL)
    pairs = [(row["rank"], base64.b64decode(row["token_bytes"])) for row in parsed["vocab"]]
    tokens = _in_order(pairs)[: size - offset]
    return _checked(Ranks(tokens, offset, settings["pattern"], _filled(names | config.special_tokens, range(offset))))


def _in_order(pairs: Sequence[tuple[int, bytes]]) -> list[bytes]:
    """The tokens of (rank, token) pairs. ValueError if the ranks are not 0, 1, 2, ... in order."""
    if [rank for rank, _ in pairs] != list(range(len(pairs))):
        raise ValueError("its ranks are not 0, 1, 2, ... without gaps")
    return [token for _, token in pairs]


def _completed(tokens: list[bytes], config: TokenizerConfig, path: Path) -> Ranks:
    """Ranks of a file without pattern and special tokens, which the recipe gives."""
    if config.pattern is None:
        raise DataError(
            f"{path} has no pattern that cuts texts into pieces. Set data.tokenizer.pattern to {', '.join(PATTERNS)}, or to "
            f"a regular expression."
        )
    if config.keep_vocab is not None:
        tokens = tokens[: config.keep_vocab - config.rank_offset]
    pattern = PATTERNS.get(config.pattern, config.pattern)
    special = _filled(config.special_tokens, range(config.rank_offset))
    taken = [f"{name}={n}" for name, n in special.items() if 0 <= n - config.rank_offset < len(tokens)]
    if taken:
        raise DataError(
            f"data.tokenizer.special_tokens: {taken[0]} is the id of an ordinary token of {path}, whose ids are "
            f"{config.rank_offset} to {config.rank_offset + len(tokens) - 1}. Use another id, or set rank_offset."
        )
    return Ranks(tokens, config.rank_offset, pattern, special)


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _filled(special: Mapping[str, int], numbers: range) -> dict[str, int]:
    """Special tokens with a name for every id of `numbers`. Spare ids get the names that Megatron-LM and Mistral use."""
    taken = set(special.values())
    return dict(special) | {f"<SPECIAL_{n}>": n for n in numbers if n not in taken}
