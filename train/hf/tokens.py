"""The tokenizer files of a directory, and its special ids.

tokenizer.json (ours: the tokenizers library's own format) --> tokenizer.json, tokenizer_config.json,
                                                               generation_config.json
a directory of theirs --> the text of its end-of-document token
"""

import json
import shutil
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from recipes.schema.errors import RecipeError, refuse
from recipes.schema.foreign import read_json
from recipes.schema.teacher_rules import tokenizer_problems
from train.hf.config import SpecialTokens

TOKENIZER = "tokenizer.json"
PIECES = "tokenizer.model"
CONFIG = "tokenizer_config.json"
_PIECES_BY_BPE = 2
"""Value of ModelType.BPE in sentencepiece_model.proto."""
_BOS = ("<bos>", "<s>", "<|begin_of_text|>")
_PAD = ("<pad>", "<|pad|>", "[PAD]")


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Special ids of a tokenizer. In our rows each document follows an end-of-document token, so that token is the bos if the
    tokenizer has no other."""
    ids = tokenizer.special
    return SpecialTokens(
        bos=next((ids[text] for text in _BOS if text in ids), tokenizer.eod),
        eos=tokenizer.eod,
        pad=next((ids[text] for text in _PAD if text in ids), None),
    )


def write_tokenizer(folder: Path, path: Path, tokenizer: Tokenizer, *, max_positions: int) -> bool:
    """Write the tokenizer's files into `folder`: transformers then gives the same ids as this project, with no
    tokens added.

    A tokenizer.json is copied without parts that would change ids (`as_trained`); rank files are converted to one. Of
    SentencePiece models, transformers reads only BPE models that do not normalise text, like Gemma's. -> whether
    transformers can load it.
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
    parsed = tokenizer.parsed()
    if tokenizer.file == TOKENIZER:
        shutil.copyfile(path, folder / TOKENIZER)
        as_trained(folder)
    elif parsed is not None:
        (folder / TOKENIZER).write_text(json.dumps(parsed, ensure_ascii=False))
    else:
        shutil.copyfile(path, folder / PIECES)
        if tokenizer.content().get("kind") != _PIECES_BY_BPE or not _leaves_texts(tokenizer):
            return False
        config["tokenizer_class"] = "GemmaTokenizer"
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return True


def as_trained(folder: Path) -> None:
    """Make the tokenizer of a folder give the ids of prepared data: no added tokens (rows have no `<bos>` from a template), no
    truncation, no padding, no dropout. Files that already do so are not changed."""
    path = folder / TOKENIZER
    if path.is_file():
        parsed = _read(path)
        plain = parsed | {"truncation": None, "padding": None, "post_processor": _silent(parsed.get("post_processor"))}
        if parsed.get("model", {}).get("dropout") is not None:
            plain["model"] = parsed["model"] | {"dropout": None}
        if plain != parsed:
            path.write_text(json.dumps(plain, ensure_ascii=False))
    path = folder / CONFIG
    if path.is_file():
        config = _read(path)
        wanted = {"add_bos_token": False, "add_eos_token": False}
        if (folder / TOKENIZER).is_file():
            wanted["tokenizer_class"] = "PreTrainedTokenizerFast"  # type: ignore[assignment]  # other classes build their own template
        if config | wanted != config:
            path.write_text(json.dumps(config | wanted, indent=2, ensure_ascii=False) + "\n")


def _silent(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor without the parts that add tokens."""
    if processor is None or processor.get("type") == "ByteLevel":
        return processor
    if processor.get("type") != "Sequence":
        return None
    kept = [part for part in map(_silent, processor.get("processors", [])) if part is not None]
    return processor | {"processors": kept} if kept else None


def _leaves_texts(tokenizer: Tokenizer) -> bool:
    """Whether decoding gives exactly the bytes of a text: no added or merged spaces, no replaced letters. transformers does
    not normalise as SentencePiece does."""
    text = "x  y\tz ﬁ "
    return int(tokenizer.token_bytes()[tokenizer.encode(text)].sum()) == len(text.encode())


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
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokenizer_file(folder: Path) -> Path | None:
    """The file this project reads a directory's tokenizer from."""
    return next((folder / name for name in (TOKENIZER, PIECES) if (folder / name).is_file()), None)


def end_of_document_of(folder: Path, config: dict[str, Any]) -> str | None:
    """The text of a directory's end-of-text token; None without a tokenizer.

    It is the special token in tokenizer.json with the id from config.json, or else the one in tokenizer_config.json.
    """
    path = tokenizer_file(folder)
    if path is None:
        return None
    wanted = config.get("eos_token_id")
    wanted = wanted[0] if isinstance(wanted, list) else wanted
    if path.name == TOKENIZER:
        for entry in _read(path).get("added_tokens", []):
            if entry.get("id") == wanted:
                return str(entry["content"])
    elif (folder / CONFIG).is_file():
        text = _read(folder / CONFIG).get("eos_token")
        if text is not None:
            return str(text["content"] if isinstance(text, dict) else text)
    raise RecipeError(
        f"{path} has no special token with the id eos_token_id={wanted} of config.json. Correct one of them, or remove "
        f"the tokenizer to import only the weights."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path, most_bytes=1 << 30))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{path} cannot be read: {error!r}. Copy the file again.") from error


def check_fingerprint(tokenizer: Tokenizer, expected: str, *, path: Path) -> None:
    """RecipeError if a checkpoint was trained with another tokenizer. An unknown one (empty) passes."""
    ours = tokenizer.fingerprint
    refuse(
        tokenizer_problems("this checkpoint", expected, ours, where=str(path), otherwise="give the right --tokenizer")
    )
