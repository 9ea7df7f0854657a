"""Prompts for reinforcement learning: records, their order, and which changes are noticed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from chats import assistant, tokenizer, user

from data.chat.prompts import PromptSet, prompt_of, read_prompts
from recipes.schema.data import ChatConfig, DataConfig
from recipes.schema.errors import DataError

VERIFIER = {"kind": "number"}


def written(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def opened(path: str, *, most_tokens: int = 64, seed: int = 1) -> PromptSet:
    config = DataConfig(chat=ChatConfig(template="chatml"), row_tokens=96, seed=seed)
    return PromptSet(config, [path], tokenizer(), answer="--tokens 8", most_tokens=most_tokens)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([1], "is a list, not a record"),
        ({"verifier": VERIFIER}, "needs either messages or a text under 'prompt'"),
        ({"prompt": "a", "messages": [user("a")], "verifier": VERIFIER}, "needs either messages or a text"),
        ({"prompt": " ", "verifier": VERIFIER}, "no text under 'prompt'"),
        ({"prompt": 3, "verifier": VERIFIER}, "no text under 'prompt'"),
        ({"messages": [user("a"), assistant("b")], "verifier": VERIFIER}, "ends with an answer"),
        ({"messages": [user("a"), user("b")], "verifier": VERIFIER}, "out of order"),
        ({"messages": [], "verifier": VERIFIER}, "an empty list of messages"),
        ({"prompt": "a", "verifier": "number"}, "no mapping under 'verifier'"),
        ({"prompt": "a", "verifier": VERIFIER, "facts": 3}, "facts that are not a mapping"),
        ({"prompt": "a", "verifier": VERIFIER, "target": "1", "facts": {"target": "2"}}, "'target' both"),
        ({"prompt": "a", "verifier": VERIFIER, "tools": "x"}, "tools that are not a list"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_prompt_is_named(tmp_path: Path, record: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        prompt_of(record)
    path = written(tmp_path / "p.jsonl", [{"prompt": "ok", "verifier": VERIFIER}, record])
    with pytest.raises(DataError, match=r"line 2 .*Correct or remove it"):
        read_prompts([path])


def test_records_become_prompts_with_facts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    records = [
        {"prompt": "Add 2 and 3.", "verifier": VERIFIER, "target": "5"},
        {"messages": [user("a"), assistant("b"), user("c")], "verifier": VERIFIER, "facts": {"target": "1"}},
    ]
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, records)).encode()))
    (first, second), digest = read_prompts([str(path)])
    assert first.messages == [user("Add 2 and 3.")] and first.facts == {"target": "5"} and first.text == "Add 2 and 3."
    assert (
        second.facts == {"target": "1"} and second.place.endswith("p.jsonl.gz line 3") and second.verifier == VERIFIER
    )
    assert digest == read_prompts([str(path)])[1]


def test_each_pass_has_all_prompts_in_an_order_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [{"prompt": f"Say {n}.", "verifier": VERIFIER} for n in range(23)])
    with opened(path) as prompts, opened(path, seed=2) as others:
        passes = [[prompts.index_at(start + place) for place in range(23)] for start in (0, 23, 46)]
        assert all(sorted(one) == list(range(23)) for one in passes)
        assert passes[0] != passes[1] != passes[2]
        assert [others.index_at(place) for place in range(23)] != passes[0]
        assert prompts.at(5) is prompts.prompts[passes[0][5]]


def test_ids_are_those_of_the_chat_template(tmp_path: Path) -> None:
    path = written(
        tmp_path / "p.jsonl",
        [{"prompt": "Say <|im_end|>.", "verifier": VERIFIER}, {"prompt": "Hi", "verifier": VERIFIER}],
    )
    with opened(path) as prompts:
        assert tokenizer().decode_all(prompts.ids(1)) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        with pytest.raises(DataError, match=r"line 1: .*special token"):
            prompts.ids(0)
        assert prompts.stop_ids == {tokenizer().eod, tokenizer().special["<|im_end|>"]}


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [{"prompt": "word " * 90, "verifier": VERIFIER}])
    with (
        opened(path) as prompts,
        pytest.raises(DataError, match=r"the prompt has \d+ tokens, and with --tokens 8 only 64 fit"),
    ):
        prompts.ids(0)


def test_other_prompts_have_another_identity(tmp_path: Path) -> None:
    records = [{"prompt": f"Say {n}.", "verifier": VERIFIER, "target": str(n)} for n in range(3)]
    with opened(written(tmp_path / "a.jsonl", records)) as one, opened(written(tmp_path / "b.jsonl", records)) as same:
        assert one.manifest_hash == same.manifest_hash
    records[2]["target"] = "7"
    with opened(written(tmp_path / "a.jsonl", records)) as other:
        assert other.manifest_hash != one.manifest_hash


def test_no_prompts_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompts there"):
        read_prompts([written(tmp_path / "p.jsonl", [])])
    (tmp_path / "p.txt").write_text("x")
    with pytest.raises(DataError, match="is not jsonl"):
        read_prompts([str(tmp_path / "p.txt")])
    with pytest.raises(DataError, match=r"^objective\.grpo\.prompts=\S+: no file there"):
        read_prompts([str(tmp_path / "none.jsonl")])
