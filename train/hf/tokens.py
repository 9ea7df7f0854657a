"""The tokenizer's files beside the weights, and which ids are special.

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
"""SentencePiece's number of that kind of model (sentencepiece_model.proto, ModelType)."""
_BOS = ("<bos>", "<s>", "<|begin_of_text|>")
_PAD = ("<pad>", "<|pad|>", "[PAD]")


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Ids of a tokenizer. A model trained here has seen the end of a document before each: without a token of its own,
    that is the beginning of a text."""
    ids = tokenizer.special
    return SpecialTokens(
        bos=next((ids[text] for text in _BOS if text in ids), tokenizer.eod),
        eos=tokenizer.eod,
        pad=next((ids[text] for text in _PAD if text in ids), None),
    )


def write_tokenizer(folder: Path, path: Path, tokenizer: Tokenizer, *, max_positions: int) -> bool:
    """Write the tokenizer's files into `folder`: the same ids in transformers as here, nothing added to a text.

    A tokenizer.json is copied without what would change ids (`as_trained`), files of ranks become one; of SentencePiece models
    transformers reads those by BPE that leave texts as they are, as Gemma's. -> whether transformers can load it.
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
    """Make a folder's tokenizer give the ids that prepared data has: no token around a text (a template's `<bos>` is not in
    the rows), nothing cut off or filled up, no chance. Files that do so already stay as they are, byte for byte."""
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
            wanted["tokenizer_class"] = "PreTrainedTokenizerFast"  # type: ignore[assignment]  # others build their own template
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
    """Whether ids stand for exactly the bytes of a text: no space put before it, none joined, no letter replaced. transformers
    does not do those as SentencePiece does."""
    text = "x  y\tz ﬁ "
    return int(tokenizer.token_bytes()[tokenizer.encode(text)].sum()) == len(text.encode())


def write_generation_config(folder: Path, tokens: SpecialTokens) -> None:
    """generation_config.json: where a text begins and ends, and how this project samples by default."""
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
    """The text of a directory's end-of-text token; None where there is no tokenizer.

    It is the special token of tokenizer.json with config.json's id, else what tokenizer_config.json says.
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
        f"{path} has no special token with the id eos_token_id={wanted} of config.json. Correct one of them, or take "
        f"the tokenizer away to import the weights only."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path, most_bytes=1 << 30))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{path} cannot be read: {error!r}. Copy the file again.") from error


def check_fingerprint(tokenizer: Tokenizer, expected: str, *, path: Path) -> None:
    """RecipeError where a checkpoint says it was trained with another tokenizer; an unknown one (empty) passes."""
    ours = tokenizer.fingerprint
    refuse(
        tokenizer_problems("this checkpoint", expected, ours, where=str(path), otherwise="give the right --tokenizer")
    )
