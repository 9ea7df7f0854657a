"""No text is lost or changed on its way to ids, for every pattern, file format and encoding library."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from prepared_files import documents_of
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers

from data.prepare import prepare
from data.store.manifest import read_manifest
from data.tokenizer import Tokenizer, hf, load_tokenizer, ranks
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError

GAPS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t\r\n]+"
"""Natural, with blanks spelled out: no-break and ideographic blanks, form feeds and line separators match nothing."""
TRAINING = ["the quick brown fox 12 jumps, over the lazy dog x²y m² 3² year 2024 10 km here\n" * 50]
FIRST = "the quick fox\n"
TEXT = "10\u00a0km\u3000here\x0cend"


def both_ways(backend: hf.HuggingFace, texts: list[str]) -> None:
    bulk = [ids.tolist() for ids in backend.encode_batch(texts, 1)]
    assert bulk == [backend.encode(text) for text in texts]
    assert [backend.decode(ids) for ids in bulk] == texts


def test_characters_that_the_pattern_does_not_match_are_kept(tmp_path: Path) -> None:
    trained = hf.train(TRAINING, TokenizerConfig(vocab_size=280, pattern=GAPS))
    both_ways(trained, [FIRST, TEXT])
    assert trained._fast is not None  # what is unmatched is a piece for both
    trained.save(tmp_path / "tokenizer.json")
    loaded = hf.load(tmp_path / "tokenizer.json", (tmp_path / "tokenizer.json").read_bytes())
    both_ways(loaded, [FIRST, TEXT])
    assert loaded.ranks is not None
    by_ranks = ranks.Tiktoken(loaded.ranks)
    assert by_ranks.encode(TEXT) == trained.encode(TEXT) and by_ranks.decode(by_ranks.encode(TEXT)) == TEXT
    content = json.dumps(hf.as_parsed(loaded.ranks)).encode()
    assert hf.load(tmp_path / "tokenizer.json", content).encode(TEXT) == trained.encode(TEXT)


@pytest.mark.parametrize(
    "pattern", ["cl100k", r"\p{N}{1,3}+|[^\p{N}]+", r" ?\p{L}++|(?:\p{N}{1,2}+-)|\p{N}|.+?", r"\w+|[^\w\s]+|\s+"]
)
def test_patterns_that_two_engines_read_differently(pattern: str, tmp_path: Path) -> None:
    """Possessive counts and word characters: in the same process, and by way of each kind of file."""
    texts = [FIRST, "year 2024", "m² x²y 12345678-", "1 12 123 1234 12345", TEXT]
    trained = hf.train(TRAINING, TokenizerConfig(vocab_size=285, pattern=pattern))
    both_ways(trained, texts)
    trained.save(tmp_path / "tokenizer.json")
    both_ways(hf.load(tmp_path / "tokenizer.json", (tmp_path / "tokenizer.json").read_bytes()), texts)
    if pattern.startswith(r"\w"):
        assert trained._fast is None and trained.note is not None and "several times slower" in trained.note
    else:
        assert trained._fast is not None and trained.note is None


def test_a_published_file_with_a_counted_possessive_keeps_its_librarys_meaning() -> None:
    """In `tokenizers` `\\p{N}{1,3}+` is any number of digits: the folder's own tokenizer decides."""
    parsed = hf.train(TRAINING, TokenizerConfig(vocab_size=290, pattern="cl100k")).parsed
    parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}+|[^\p{N}]+"
    library = tokenizers.Tokenizer.from_str(json.dumps(parsed))
    wanted = [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str("year 20245")]
    assert wanted[-1] == "20245"
    both_ways(hf.HuggingFace(library), ["year 20245", "2024 2024"])


def test_the_configured_encoder_is_used_after_training_the_tokenizer_too() -> None:
    trained = hf.train(TRAINING, TokenizerConfig(vocab_size=280, encoder="tokenizers"))
    assert trained._fast is None and trained.note is None


def library_of(model: object, *, special: list[str], pre: object = None) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre
    library.add_special_tokens(special)
    return library


SPELLED = "a</s>b </s> a"
LETTERS = {letter: 3 + n for n, letter in enumerate("ab</s>▁")}


MODELS = {
    "Unigram": lambda: models.Unigram(
        [("<unk>", 0.0), ("</s>", -1.0), ("x", -9.0), *((x, -5.0) for x in LETTERS)], unk_id=0
    ),
    "WordLevel": lambda: models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"),
    "WordPiece": lambda: models.WordPiece(
        {"[UNK]": 0, "</s>": 1, "a": 2, "<": 3, "##/": 4, "##s": 5, "##>": 6}, unk_token="[UNK]"
    ),
    "ignore_merges": lambda: models.BPE(
        {"<unk>": 0, "</s>": 1, "x": 2} | LETTERS, [], unk_token="<unk>", ignore_merges=True
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_special_tokens_spelled_out_in_a_text_are_text(model: str) -> None:
    pre = pre_tokenizers.Metaspace() if model == "Unigram" else pre_tokenizers.WhitespaceSplit()
    library = library_of(MODELS[model](), special=["</s>"], pre=pre)
    backend = hf.HuggingFace(library)
    assert 1 in library.encode(SPELLED, add_special_tokens=False).ids  # as the library by itself would have it
    (bulk,) = backend.encode_batch([SPELLED], 1)
    assert 1 not in bulk and bulk.tolist() == backend.encode(SPELLED)


def test_dropout_in_a_file_is_turned_off() -> None:
    parsed = hf.train(TRAINING, TokenizerConfig(vocab_size=290)).parsed
    parsed["model"]["dropout"] = 0.5
    backend = hf.HuggingFace(tokenizers.Tokenizer.from_str(json.dumps(parsed)))
    assert len({tuple(backend.encode(TRAINING[0][:200])) for _ in range(5)}) == 1


def lossy_file(path: Path) -> Path:
    """A BPE with the letters of the training text only, and no unknown token: the library drops all others."""
    letters = sorted(set("".join(TRAINING)))
    model = models.BPE({"<eod>": 0} | {letter: 1 + n for n, letter in enumerate(letters)}, [])
    library = library_of(model, special=["<eod>"])
    library.decoder = decoders.Fuse()
    library.save(str(path))
    return path


def test_a_text_that_decoding_does_not_give_back_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = lossy_file(tmp_path / "lossy.json")
    lines = [json.dumps({"text": f"the quick fox {n % 3}"}) for n in range(12)]
    lines[6] = json.dumps({"text": "the käfer"})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        folder=str(tmp_path / "out"),
        sources={"a": SourceConfig(path=str(tmp_path / "a.jsonl"))},
        tokenizer=TokenizerConfig(path=str(path), end_of_document="<eod>"),
        workers=1,
    )
    with pytest.raises(
        DataError, match=r"a\.jsonl:7 loses 2 of its 9 bytes when it is encoded, the first near 'the käfer'"
    ):
        prepare(config, console=Console(quiet=True))
    skipping = SourceConfig(path=str(tmp_path / "a.jsonl"), on_bad_record="skip")
    manifest = prepare(
        replace(config, folder=str(tmp_path / "skip"), sources={"a": skipping}), console=Console(quiet=True)
    )
    assert manifest is not None and manifest.sources["a"].bad_records == 1


def test_unknown_tokens_are_counted_and_reported(tmp_path: Path) -> None:
    model = models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "fox": 3}, unk_token="<unk>")
    library_of(model, special=["</s>"], pre=pre_tokenizers.WhitespaceSplit()).save(str(tmp_path / "words.json"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"the fox {n} strange"}) for n in range(12)))
    config = DataConfig(
        folder=str(tmp_path / "out"),
        sources={"a": SourceConfig(path=str(tmp_path / "a.jsonl"))},
        tokenizer=TokenizerConfig(path=str(tmp_path / "words.json"), end_of_document="</s>"),
        workers=1,
    )
    said = io.StringIO()
    prepare(config, console=Console(file=said, width=200))
    assert "24 words or characters became the unknown token" in said.getvalue()


def test_shards_hold_the_ids_of_the_folders_own_tokenizer(tmp_path: Path) -> None:
    """For each pattern, the ids of each document are those that the saved tokenizer gives, one by one."""
    for n, pattern in enumerate(("cl100k", GAPS, r"\w+|[^\w\s]+|\s+")):
        texts = [f"year {n} {2**n} m² \u00a0x{n}\u3000\r\n" for n in range(40)]
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        config = DataConfig(
            folder=str(tmp_path / f"out{n}"),
            sources={"a": SourceConfig(path=str(tmp_path / "a.jsonl"))},
            tokenizer=TokenizerConfig(vocab_size=290, pattern=pattern),
            workers=1,
        )
        prepare(config, console=Console(quiet=True))
        folder = Path(config.folder)
        reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        found = set()
        for entries in read_manifest(folder).sources["a"].splits.values():
            for entry in entries:
                for ids in documents_of(folder, entry):
                    text = load_tokenizer(folder / "tokenizer.json", config.tokenizer).decode(ids)
                    assert ids[:-1].tolist() == reference.encode(text).ids
                    found.add(text)
        assert found == set(texts)


def test_losses_are_measured_on_the_normalised_text() -> None:
    from tokenizers import normalizers

    parsed = hf.train(TRAINING, TokenizerConfig(vocab_size=290)).parsed
    library = tokenizers.Tokenizer.from_str(json.dumps(parsed))
    library.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(hf.HuggingFace(library), "<|endoftext|>")
    for text in ("e\u0301a", "plain", "日本 \u00a0"):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.loss(text, ids) is None
        assert "loses" in str(tokenizer.loss(text, ids[:-1]))
