"""Tokenizer files of every kind: the same ids as the library that made them, one fingerprint per vocabulary."""

import base64
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import Tokenizer, Unencodable, hf, load_tokenizer, ranks, train_tokenizer
from recipes.schema.data import TokenizerConfig
from recipes.schema.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
FILES = [*sorted((ROOT / "data").glob("*.py")), *sorted((ROOT / "docs").glob("*.md"))]
SAMPLE = [
    *filter(None, (path.read_text() for path in FILES)),
    "Zażółć gęślą jaźń, 日本語のテキスト。 Ωμέγα 12345 ÀÉÎ can't WE'LL\r\n\t  x\u0085\u2028 \U0001f600\U0001f468\u200d",
]
EOD = "<|endoftext|>"


@cache
def trained(pattern: str | None = None) -> Tokenizer:
    return train_tokenizer(SAMPLE, TokenizerConfig(vocab_size=1500, pattern=pattern, special_tokens={"<pad>": 1}))


def ranks_of(tokenizer: Tokenizer) -> ranks.Ranks:
    backend = tokenizer._backend
    assert isinstance(backend, hf.HuggingFace) and backend.ranks is not None
    return backend.ranks


def tekken(path: Path, given: ranks.Ranks) -> Path:
    """A file as Mistral writes them."""
    vocab = [
        {"rank": n, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for n, t in enumerate(given.tokens)
    ]
    special = [{"rank": n, "token_str": name, "is_control": True} for name, n in given.special.items()]
    config = {
        "pattern": given.pattern,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": given.vocab_size,
        "default_num_special_tokens": given.offset,
        "version": "v7",
    }
    path.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special}))
    return path


texts = st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(
    st.sampled_from(
        ["the", " ", "\n", "  ", "\t", "é", "日", "'s", "I'LL", "123", "!?", EOD, "<pad>", "\u0301", "\xa0"]
    ),
    max_size=20,
).map("".join)


@given(text=texts, pattern=st.sampled_from([None, *ranks.PATTERNS]))
def test_bulk_encoding_gives_the_ids_of_the_library(text: str, pattern: str | None) -> None:
    """encode is `tokenizers`, encode_batch is tiktoken; decoding gives the text back."""
    tokenizer = trained(pattern)
    (bulk,) = tokenizer.encode_batch([text])
    assert bulk.tolist() == tokenizer.encode(text)
    assert tokenizer.decode(bulk) == text
    assert tokenizer.eod not in bulk  # spelled out, it is text
    assert tokenizer.token_bytes()[bulk].sum() == len(text.encode())
    assert len(text.encode()) <= len(bulk) * tokenizer.most_bytes_per_token


def test_a_long_text_has_the_ids_of_its_parts_and_no_fewer_than_its_bytes_allow() -> None:
    tokenizer = trained()
    assert tokenizer.most_bytes_per_token == max(map(len, ranks_of(tokenizer).tokens))  # no other token is longer
    text = "\n".join(SAMPLE)
    assert len(text) > 5000
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode_batch([text])[0].tolist() and tokenizer.decode(ids) == text


def test_a_vocabulary_is_one_tokenizer_in_every_file(tmp_path: Path) -> None:
    tokenizer = trained("nemotron")
    given = ranks_of(tokenizer)
    config = TokenizerConfig(pattern="nemotron", rank_offset=2, special_tokens=dict(given.special))
    tokenizer.save(tmp_path / "tokenizer.json")
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    parsed["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "cut.json").write_text(json.dumps(parsed, indent=4))
    tekken(tmp_path / "tekken.json", given)
    rows = [
        {"rank": n, "token_bytes": base64.b64encode(t).decode(), "token_str": ""} for n, t in enumerate(given.tokens)
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    lines = [base64.b64encode(t) + b" %d\n" % n for n, t in enumerate(given.tokens)]
    (tmp_path / "openai.tiktoken").write_bytes(b"".join(lines))
    (tmp_path / "back.json").write_text(json.dumps(hf.as_parsed(given)))
    ranks.Tiktoken(given).save(tmp_path / ranks.FILE)
    wanted = [tokenizer.encode(text) for text in SAMPLE]
    for name in ("tokenizer.json", "cut.json", "tekken.json", "list.json", "openai.tiktoken", "back.json", ranks.FILE):
        loaded = load_tokenizer(tmp_path / name, config)
        assert loaded.fingerprint == tokenizer.fingerprint, name
        assert [ids.tolist() for ids in loaded.encode_batch(SAMPLE, threads=2)] == wanted, name
        assert (loaded.vocab_size, loaded.eod) == (1500, 0)
    for other in (trained(), trained("o200k")):
        assert other.fingerprint != tokenizer.fingerprint


def test_megatrons_tiktoken_gives_the_same_ids(tmp_path: Path) -> None:
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    given = ranks_of(trained("nemotron"))
    single = sorted(t for t in given.tokens if len(t) == 1)
    tokens = single + [t for t in given.tokens if len(t) > 1]  # its loader wants the bytes in order
    rows = [{"rank": n, "token_bytes": base64.b64encode(t).decode(), "token_str": ""} for n, t in enumerate(tokens)]
    path = tmp_path / "nemotron.json"
    path.write_text(json.dumps(rows))
    theirs = TikTokenTokenizer(str(path), num_special_tokens=1000, vocab_size=1000 + len(tokens))
    special = {name: n for n, name in enumerate(["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>"])}
    config = TokenizerConfig(
        path=str(path), pattern="nemotron", rank_offset=1000, end_of_document="</s>", special_tokens=special
    )
    ours = load_tokenizer(path, config)
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    # Megatron reads a special token spelled out in a text as the token, this project as text.
    plain = [text for text in SAMPLE if not any(name in text for name in theirs.special_tokens)]
    assert len(plain) > len(SAMPLE) / 2
    assert [ours.encode(text) for text in plain] == [theirs.text_to_ids(text) for text in plain]
    assert ours.special == {name: n for n, name in enumerate(theirs.special_tokens)}
    smaller = load_tokenizer(path, replace(config, keep_vocab=1300))
    assert smaller.vocab_size == 1300 and smaller.fingerprint != ours.fingerprint
    assert max(smaller.encode(SAMPLE[0])) < 1300 and smaller.decode(smaller.encode(SAMPLE[0])) == SAMPLE[0]


def test_merges_that_ranks_cannot_stand_for_are_left_to_the_library() -> None:
    tokenizer = trained()
    backend = tokenizer._backend
    assert isinstance(backend, hf.HuggingFace)
    parsed = json.loads(backend._library.to_str())
    assert hf.as_ranks(parsed) is not None
    merges = parsed["model"]["merges"]
    swapped = json.loads(json.dumps(parsed))
    swapped["model"]["merges"][5:7] = merges[6], merges[5]
    assert hf.as_ranks(swapped) is None
    fewer = json.loads(json.dumps(parsed))
    del fewer["model"]["merges"][10]  # its token is in the vocabulary and cannot be made
    assert hf.as_ranks(fewer) is None
    matched = json.loads(json.dumps(parsed))
    matched["added_tokens"].append(dict(parsed["added_tokens"][0], content="the", id=1500, special=False))
    assert hf.as_ranks(matched) is None
    for changed in (swapped, fewer, matched):
        library = tokenizers.Tokenizer.from_str(json.dumps(changed))
        other = Tokenizer(hf.HuggingFace(library), EOD)
        assert other.fingerprint != tokenizer.fingerprint
        (ids,) = other.encode_batch([SAMPLE[0]])
        library.encode_special_tokens = True
        assert ids.tolist() == library.encode(SAMPLE[0], add_special_tokens=False).ids
        assert other.decode(ids) == SAMPLE[0]


def test_tokenizer_files_that_are_not_byte_level(tmp_path: Path) -> None:
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = tokenizers.Tokenizer(
        models.WordPiece({"[UNK]": 0, "[SEP]": 1, "hel": 2, "##lo": 3, "world": 4}, unk_token="[UNK]")
    )
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    words.normalizer = normalizers.Lowercase()
    words.add_special_tokens(["[SEP]"])
    words.save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(tmp_path / "words.json", TokenizerConfig(end_of_document="[SEP]"))
    assert loaded.encode("Hello WORLD") == [2, 3, 4] and loaded.decode([2, 3, 4, 1]) == "hello world"
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{b:02X}>": 2 + b for b in range(256)} | {"▁": 258, "a": 259, "▁a": 260}
    pieces = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces.add_special_tokens(["<s>"])
    pieces.save(str(tmp_path / "pieces.json"))
    loaded = load_tokenizer(tmp_path / "pieces.json", TokenizerConfig(end_of_document="<s>"))
    ids = loaded.encode("a aé")
    assert loaded.decode([1, *ids]) == "a aé"
    assert loaded.token_bytes()[ids].tolist() == [2, 2, 1, 1]  # the first stands for a blank that is not in the text


def test_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(SAMPLE))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=1200, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    config = TokenizerConfig(end_of_document="</s>")
    path = tmp_path / "sp.model"
    ours = load_tokenizer(path, config)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (ours.vocab_size, ours.eod, ours.special["<pad>"]) == (1200, 1, 0)
    for text, ids in zip(SAMPLE, ours.encode_batch(SAMPLE, threads=2), strict=True):
        assert ids.tolist() == ours.encode(text) == theirs.encode(text)
        assert ours.decode([*ids, ours.eod]) == text
        assert ours.token_bytes()[ids].sum() == len(text.encode()) + 1  # and the blank it puts before a text
    ours.save(tmp_path / "tokenizer.model.v3")
    again = load_tokenizer(tmp_path / "tokenizer.model.v3", config)
    assert again.fingerprint == ours.fingerprint
    assert 1 not in ours.encode("</s>")


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("gone.json", None, {}, "no tokenizer at"),
        ("broken.json", "{", {}, "is not JSON"),
        ("model.json", '{"model": 3}', {}, "is not a tokenizer.json"),
        ("x.model", "junk", {}, "is not a SentencePiece model"),
        ("x.tiktoken", "aGVsbG8= 0\n", {}, "Set data.tokenizer.pattern to gpt2, cl100k"),
        ("x.tiktoken", "aGVsbG8= 0\n", {"pattern": "gpt2"}, "no token for 256 of the 256 bytes"),
        ("x.tiktoken", "aGVsbG8= 7\n", {"pattern": "gpt2"}, "ranks are not 0, 1, 2, "),
        ("x.tiktoken", "junk", {"pattern": "gpt2"}, "is not a tiktoken or tekken file"),
        ("list.json", '[{"rank": 0}]', {"pattern": "gpt2"}, "is not a tiktoken or tekken file"),
    ],
)
def test_files_that_are_no_tokenizers(
    tmp_path: Path, name: str, content: str | None, fields: dict, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name, TokenizerConfig(**fields))


def test_special_tokens_are_explicit(tmp_path: Path) -> None:
    trained().save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"no special token '</s>'.*<\|endoftext\|>, <pad>"):
        load_tokenizer(tmp_path / "tokenizer.json", TokenizerConfig(end_of_document="</s>"))
    assert trained().special == {EOD: 0, "<pad>": 1}
    with pytest.raises(DataError, match=r"must have the ids 0, 1, 2, \.\.\. without gaps"):
        train_tokenizer(SAMPLE, TokenizerConfig(vocab_size=1000, special_tokens={"<pad>": 7}))
    bytes_only = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    (tmp_path / "x.tiktoken").write_bytes(bytes_only)
    taken = TokenizerConfig(pattern="gpt2", special_tokens={EOD: 97})
    with pytest.raises(DataError, match=r"<\|endoftext\|>=97 is the id of an ordinary token"):
        load_tokenizer(tmp_path / "x.tiktoken", taken)
    behind = load_tokenizer(tmp_path / "x.tiktoken", replace(taken, special_tokens={EOD: 256}))
    assert (behind.eod, behind.vocab_size) == (256, 257)


def test_texts_that_tiktoken_gives_up_on() -> None:
    blanks = "x" + " " * 1_000_000 + "y"
    tokenizer = trained()
    (ids,) = tokenizer.encode_batch([blanks])  # the other library steps in
    assert tokenizer.decode(ids) == blanks
    with pytest.raises(Unencodable, match="cannot be cut into tokens: tiktoken"):
        Tokenizer(ranks.Tiktoken(ranks_of(tokenizer)), EOD).encode_batch([blanks])


def test_characters_come_whole_out_of_the_incremental_decoder() -> None:
    tokenizer = trained()
    decoder = tokenizer.incremental_decoder()
    text = SAMPLE[-1]
    given = [decoder.feed(int(token)) for token in tokenizer.encode(text)] + [decoder.finish()]
    assert "".join(given) == text and not any("\ufffd" in piece for piece in given)
    assert np.all(tokenizer.token_bytes()[:2] == 0)
