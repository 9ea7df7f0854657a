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
from train.errors import RecipeError
from train.hf.config import SpecialTokens

TOKENIZER = "tokenizer.json"
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

    -> whether transformers can load it. Another kind than tokenizer.json is copied as it is.
    """
    if tokenizer.file != TOKENIZER:
        shutil.copyfile(path, folder / path.name)
        return False
    shutil.copyfile(path, folder / TOKENIZER)
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
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return True


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


def end_of_document_of(folder: Path, config: dict[str, Any]) -> str | None:
    """The text of a directory's end-of-text token, by its configuration's id; None where there is no tokenizer.json."""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    wanted = config.get("eos_token_id")
    wanted = wanted[0] if isinstance(wanted, list) else wanted
    try:
        added = {entry["content"]: int(entry["id"]) for entry in json.loads(path.read_text()).get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} cannot be read as a tokenizer.json: {error!r}") from error
    for text, number in added.items():
        if number == wanted:
            return text
    raise RecipeError(
        f"{path} has no special token with the id eos_token_id={wanted} of config.json. Correct one of them, or take "
        f"the tokenizer away to import the weights only."
    )


def check_fingerprint(tokenizer: Tokenizer, expected: str, *, path: Path) -> None:
    """RecipeError where a checkpoint says it was trained with another tokenizer; an unknown one (empty) passes."""
    if expected and tokenizer.fingerprint != expected:
        raise RecipeError(
            f"{path} is not the tokenizer this checkpoint was trained with (its fingerprint is "
            f"{tokenizer.fingerprint[:12]}, the checkpoint's {expected[:12]}). Give the right one with --tokenizer."
        )
