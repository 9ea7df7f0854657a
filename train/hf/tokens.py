"""The tokenizer files of a directory, and its special ids.

our tokenizer file --write_tokenizer--> tokenizer.json, tokenizer_config.json
a directory's tokenizer files --> the texts of its end-of-document and begin-of-document tokens
"""

import json
import shutil
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, load_tokenizer
from recipes.schema.data import TokenizerConfig
from recipes.schema.errors import DataError, RecipeError, refuse
from recipes.schema.foreign import read_json
from recipes.schema.teacher_rules import tokenizer_problems
from train.hf.config import SpecialTokens

TOKENIZER = "tokenizer.json"
PIECES = "tokenizer.model"
CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
_MOST_BYTES = 1 << 30
"""Size of the largest tokenizer.json that is read."""
ODD_TEXTS = (
    "", " ", "a", " a", "  two spaces  before and after  ", "tab\there", "\n\nlines\n", "line end\r\nof Windows\r",
    "no\u00a0break\u3000space", "year 2024, 1234567 and 3.14", "e\u0301 combined, \u00e9 not", "ﬁ ² Ⅷ ª", "日本語の文",
    "नमस्ते ก็ ﷺ", "👨\u200d👩\u200d👧 🇩🇪 ☺️", "▁under▁score", "I'LL it's don't", "aaaaaaaaaaaaaaaaaaaaaaaa", "x\x00\x7f\x85y",
    "def f(x):\n    return x  # {}",
)  # fmt: skip
"""Texts that tokenizers often read differently. None contains the name of a special token: it is text here, a token there."""
_BOS = ("<bos>", "<s>", "<|begin_of_text|>")
_PAD = ("<pad>", "<|pad|>", "[PAD]")


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Special ids of a tokenizer. Without a begin-of-document token and without a token of a usual name, the end-of-document
    token is the bos: in our rows it stands before each document except the first."""
    ids = tokenizer.special
    bos = next((ids[text] for text in _BOS if text in ids), tokenizer.eod)
    return SpecialTokens(
        bos=bos if tokenizer.bod is None else tokenizer.bod,
        eos=tokenizer.eod,
        pad=next((ids[text] for text in _PAD if text in ids), None),
    )


def write_tokenizer(folder: Path, path: Path, tokenizer: Tokenizer, *, max_positions: int) -> None:
    """Write the tokenizer's files into `folder`: transformers then gives the ids of prepared data.

    A tokenizer.json is copied without the parts that would change ids (`as_trained`). Rank files and SentencePiece models are
    converted to one. A tokenizer_config.json that is there already keeps its other fields.

    DataError says what cannot be converted. Then nothing is written: transformers loads a tokenizer.model on its own and
    reads some of them differently.
    """
    tokens = special_tokens(tokenizer)
    texts = {number: text for text, number in tokenizer.special.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    for key, number in (("bos_token", tokens.bos), ("eos_token", tokens.eos), ("pad_token", tokens.pad)):
        if number is not None:
            config[key] = texts[number]
    if tokenizer.file == TOKENIZER:
        shutil.copyfile(path, folder / TOKENIZER)
    else:
        parsed = tokenizer.parsed()
        if parsed is None:
            raise DataError(f"there is no conversion of {path.name} to a {TOKENIZER}.")
        _write(folder / TOKENIZER, parsed)
    if tokenizer.file == PIECES:
        shutil.copyfile(
            path, folder / PIECES
        )  # transformers prefers tokenizer.json; other programs read only this file
    published = _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    _write(folder / CONFIG, config | published, indent=2)
    as_trained(folder, tokenizer)


def as_trained(folder: Path, tokenizer: Tokenizer) -> None:
    """Make the tokenizer of a folder give the ids of prepared data: the recipe's begin-of-document token before a text and no
    other added token, no truncation, no padding, no dropout. Files that already do so are not changed."""
    begin = next((text for text, number in tokenizer.special.items() if number == tokenizer.bod), None)
    path = folder / TOKENIZER
    if path.is_file():
        parsed = _read(path)
        template = None if begin is None else (begin, tokenizer.special[begin])
        plain = parsed | {
            "truncation": None,
            "padding": None,
            "post_processor": _processor(parsed.get("post_processor"), template),
        }
        if parsed["model"].get("dropout") is not None:
            plain["model"] = parsed["model"] | {"dropout": None}
        if plain != parsed:
            _write(path, plain)
    path = folder / CONFIG
    if path.is_file():
        config = _read(path)
        wanted: dict[str, Any] = {"add_bos_token": begin is not None, "add_eos_token": False}
        if begin is not None and _text_of(config.get("bos_token")) != begin:
            wanted["bos_token"] = begin
        if (folder / TOKENIZER).is_file():
            wanted["tokenizer_class"] = "PreTrainedTokenizerFast"  # other classes build their own template
        if config | wanted != config:
            _write(path, config | wanted, indent=2)


def _processor(processor: dict[str, Any] | None, begin: tuple[str, int] | None) -> dict[str, Any] | None:
    """A post-processor that adds only the token `begin` (text, id) before a text; None: one that adds nothing."""
    quiet = _without_templates(processor)
    if begin is None:
        return quiet
    text, number = begin
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    before = [{"SpecialToken": {"id": text, "type_id": kind}} for kind in (0, 1)]
    template = {
        "type": "TemplateProcessing",
        "single": [before[0], first],
        "pair": [before[0], first, before[1], second],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }
    parts = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    adding = [part for part in parts if _without_templates(part) is None]
    if len(adding) == 1 and adding[0].get("single") == template["single"]:
        return processor  # the published template already does this
    if quiet is None:
        return template
    inner = quiet["processors"] if quiet["type"] == "Sequence" else [quiet]
    return {"type": "Sequence", "processors": [*inner, template]}


def _without_templates(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor without the parts that add tokens."""
    if processor is None or processor.get("type") == "ByteLevel":
        return processor
    if processor.get("type") != "Sequence":
        return None
    rest = [part for part in map(_without_templates, processor.get("processors", [])) if part is not None]
    return processor | {"processors": rest} if rest else None


def write_generation_config(folder: Path, tokens: SpecialTokens) -> None:
    """Write generation_config.json: bos, eos and pad ids, and this project's default sampling."""
    config = {
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.eos if tokens.pad is None else tokens.pad,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    _write(folder / GENERATION_CONFIG, config, indent=2)


def tokenizer_file(folder: Path) -> Path | None:
    """The file this project reads a directory's tokenizer from. It may be a pipe or a broken link: reading it fails."""
    paths = (folder / name for name in (TOKENIZER, PIECES))
    return next((path for path in paths if path.exists() or path.is_symlink()), None)


def end_of_document_of(folder: Path, config: dict[str, Any]) -> str | None:
    """The text of a directory's end-of-text token; None without a tokenizer.

    It is the special token in tokenizer.json with the id from config.json, or else the one in tokenizer_config.json.
    """
    path = tokenizer_file(folder)
    if path is None:
        return None
    wanted = config.get("eos_token_id")
    wanted = next(iter(wanted), None) if isinstance(wanted, list) else wanted
    if path.name == TOKENIZER:
        added = _read(path).get("added_tokens")
        for entry in added if isinstance(added, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("content"), str) and entry.get("id") == wanted:
                return str(entry["content"])
    elif (folder / CONFIG).exists():
        text = _text_of(_read(folder / CONFIG).get("eos_token"))
        if text is not None:
            return text
    raise RecipeError(
        f"{path} has no special token with the id eos_token_id={wanted!r} of config.json. Correct one of them, or remove "
        f"the tokenizer to import only the weights."
    )


def begin_of_document_of(folder: Path, end_of_document: str) -> str | None:
    """The special token that a directory's tokenizer puts before a text; None if it puts none or cannot be read.

    It is the first token of the template in tokenizer.json. Without a template, it is `bos_token` in tokenizer_config.json if
    `add_bos_token` is true there, which older versions of transformers and SentencePiece models go by.
    """
    path = tokenizer_file(folder)
    assert path is not None, f"{folder} has no tokenizer"
    try:
        tokenizer = load_tokenizer(path, TokenizerConfig(end_of_document=end_of_document))
    except DataError:
        return None
    begin = tokenizer.template_begin
    if begin is None and (folder / CONFIG).exists():
        config = _read(folder / CONFIG)
        begin = _text_of(config.get("bos_token")) if config.get("add_bos_token") is True else None
    return begin if begin in tokenizer.special else None


def _text_of(token: Any) -> str | None:
    """A token of tokenizer_config.json, which is a text or an object with the text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path, most_bytes=_MOST_BYTES)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}. Copy the file again.") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} is not an object of fields but {type(value).__name__}. Copy the file again.")
    return value


def _write(path: Path, value: dict[str, Any], *, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n")


def check_fingerprint(tokenizer: Tokenizer, expected: str, *, path: Path) -> None:
    """RecipeError if a checkpoint was trained with another tokenizer. An unknown one (empty) passes."""
    ours = tokenizer.fingerprint
    refuse(
        tokenizer_problems("this checkpoint", expected, ours, where=str(path), otherwise="give the right --tokenizer")
    )
