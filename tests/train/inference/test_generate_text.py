"""`stratum generate`: one stream, or many prompts in one batch as JSON; files of prompts and what is wrong with them."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed_runs import recipe_in
from ranks import run_ranks
from shards import random_documents, write_folder

from recipes.schema.errors import CheckpointError, DataError, StratumError
from recipes.schema.mtp import MtpConfig
from recipes.schema.tools import GenerateConfig
from train.inference.text import generate_records, read_prompts, stream_text
from train.run import train


def texts(rank: int, folder: Path) -> dict[str, Any]:
    """Train six steps, then generate in every way."""
    os.chdir(folder)
    plain = recipe_in(folder, steps_=6)
    recipe = replace(plain, model=replace(plain.model, mtp=MtpConfig(depths=2)))
    found: dict[str, Any] = {}
    try:
        "".join(stream_text(recipe, GenerateConfig()))
    except CheckpointError as error:
        found["untrained"] = str(error)
    train(recipe)
    (folder / "prompts.jsonl").write_text('"ab\\n"\n{"prompt": "c", "id": 1}\n')
    config = GenerateConfig(prompts="prompts.jsonl", n=2, tokens=6, logprobs=2, temperature=1.0, top_p=1.0, seed=3)
    found["records"] = list(generate_records(recipe, config))
    (folder / "chats.jsonl").write_text('"hi"\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    alone = replace(config, n=1, temperature=0.0, logprobs=None)
    chats = replace(alone, prompts="chats.jsonl", chat=True, chat_template="turns")
    found["chats"] = [record["text"] for record in generate_records(recipe, chats)]
    found["chat"] = "".join(stream_text(recipe, replace(chats, prompts=None, prompt="hi")))
    found["as text"] = "".join(stream_text(recipe, replace(alone, prompts=None, prompt="User\nhi\nAssistant\n")))
    write_folder(folder / "other", {"a": [random_documents(9, seed=1)]}, vocab=270)
    other = replace(recipe, data=replace(recipe.data, folder=str(folder / "other")))
    one = replace(config, prompt="c", prompts=None, n=1)
    for name, read, asked in (
        ("tokenizer", other, one),
        ("beyond memory", recipe, replace(one, tokens=10**15)),
        ("no depths", plain, replace(one, speculate="mtp")),
    ):
        try:
            "".join(stream_text(read, asked))
        except StratumError as error:
            found[name] = str(error)
    for name, wrong in {
        "alone": {"draft_tokens": 3},
        "nowhere": {"speculate": "runs/nowhere"},
        "empty": {"speculate": ""},
    }.items():
        try:
            list(generate_records(recipe, replace(config, **wrong)))
        except StratumError as error:
            found[name] = str(error)
    greedy = replace(config, temperature=0.0, tokens=30)
    for speculate in (None, "lookup", "mtp", str(Path(recipe.run.folder) / recipe.run.name)):
        one = replace(greedy, speculate=speculate, draft_tokens=speculate and 3)
        found.setdefault("speculated", []).append(list(generate_records(recipe, one)))
    found["single"] = "".join(stream_text(recipe, replace(config, prompt="c", prompts=None, n=1, seed=4)))
    return found


def test_prompts_of_a_file_are_continued_in_one_batch(tmp_path: Path) -> None:
    found = run_ranks(1, texts, tmp_path)[0]
    assert "contains no checkpoint" in found["untrained"]
    assert "The longest that fits has " in found["beyond memory"]
    assert "was trained with another tokenizer" in found["tokenizer"]
    assert "--speculate mtp needs a model with further depths, but model.mtp.depths=0." in found["no depths"]
    records = found["records"]
    assert [(record["prompt"], record["sample"]) for record in records] == [
        ("ab\n", 0),
        ("ab\n", 1),
        ("c", 0),
        ("c", 1),
    ]
    assert found["single"] == "c" + records[3]["text"], "a text of a batch is the text alone with its seed"
    assert "--draft-tokens 3" in found["alone"] and "--speculate lookup" in found["alone"]
    assert "runs/nowhere" in found["nowhere"] and "'' is not the name of a checkpoint" in found["empty"]
    plain, *speculated = found["speculated"]
    for guessed in speculated:
        assert [record["tokens"] for record in guessed] == [record["tokens"] for record in plain]
        counts = [record.pop("speculation") for record in guessed]
        assert all(one["steps"] <= len(record["tokens"]) for one, record in zip(counts, guessed, strict=True))
    assert counts[0]["accepted"] == counts[0]["guessed"] > 0, "a model guesses its own greedy tokens"
    for record in records:
        assert len(record["tokens"]) == len(record["logprobs"]) == len(record["top_logprobs"]) <= 6
        assert record["finish"] in ("length", "stop") and all(len(top) == 2 for top in record["top_logprobs"])
    assert json.loads(json.dumps(records[0]))["text"] == records[0]["text"]

    # The answer alone, and the same text as after the words that the template writes.
    assert found["chats"] == [found["chat"]] * 2
    assert found["as text"] == "User\nhi\nAssistant\n" + found["chat"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('"a"\n{"text": "b"}\n', "prompt 2 has no text"),
        ("{\n", "prompt 1 is not JSON"),
        ("\n \n", "has no prompts"),
        ('{"prompt": "a", "prompt": "b"}\n', "the key 'prompt' is written twice"),
    ],
)
def test_a_wrong_file_of_prompts_is_named(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(DataError, match=problem):
        read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user"}, "hi"]}\n')
    with pytest.raises(DataError, match="prompt 1: message 2 is a str"):
        read_prompts(tmp_path / "prompts.jsonl", is_chat=True)


def test_prompts_are_lines_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text('one\n\n{"two"}\n')
    assert read_prompts(tmp_path / "prompts.txt") == ["one", '{"two"}']
    with pytest.raises(DataError, match="cannot read the prompts"):
        read_prompts(tmp_path / "absent.txt")


def test_only_line_breaks_end_a_prompt(tmp_path: Path) -> None:
    """U+2028 and U+0085 are characters of a JSON string."""
    (tmp_path / "p.jsonl").write_text('"a\u2028b"\n{"prompt": "x\u0085y"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == ["a\u2028b", "x\u0085y"]
