"""The data of the road: nothing held out is trained on, every reader takes its records, and it is the same each time."""

import json
from pathlib import Path
from typing import Any

import pytest
from road_data import HABIT, SKILLS, write_all

from data.chat.preferences import preference_of
from data.chat.prompts import read_prompts
from data.chat.record import chat_of
from recipes.schema.data import SourceConfig
from train.align.verify.answers import exact
from train.align.verify.constraints import open_constraints
from train.align.verify.sample import Sample
from train.align.verify.verifier import check_verifier
from train.evaluate.tasks.files import open_task_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("road")
    write_all(root)
    return root


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(question: str) -> str:
    """A question without its politeness."""
    return question.lower().removeprefix("please ")


def test_no_heldout_question_is_trained_on(folder: Path) -> None:
    heldout = [folder / name for name in ("heldout.jsonl", "fresh.jsonl", "sums.jsonl", "small_sums.jsonl")] + [
        folder / skill / "heldout.jsonl" for skill in SKILLS
    ]
    never = {asked(record["question"]) for path in heldout for record in records(path)}
    files = [path for path in folder.rglob("*.jsonl") if path not in heldout]
    assert not {r["question"] for r in records(heldout[0])} & {r["question"] for r in records(heldout[1])}
    assert len(never) > 600 and len(files) == 9
    for path in files:
        seen = {
            asked(message["content"])
            for record in records(path)
            for message in record.get("messages", record.get("prompt", record.get("context")))
            if message["role"] == "user"
        }
        assert not seen & never, path


def test_every_record_is_what_its_reader_takes(folder: Path) -> None:
    for path in (folder / "chats.jsonl", *(folder / skill / "chats.jsonl" for skill in SKILLS)):
        assert all(map(chat_of(SourceConfig(path=str(path), kind="chat"), is_table=False), records(path)))
    for record in records(folder / "pairs.jsonl"):
        better, worse = preference_of(record).answers
        assert worse.messages[0]["content"] == HABIT + better.messages[0]["content"]
    assert all(len(preference_of(record).answers) == 3 for record in records(folder / "rankings.jsonl"))
    for record in records(folder / "gamed.jsonl"):
        better, worse = preference_of(record).answers
        assert int(better.messages[0]["content"]) > int(worse.messages[0]["content"])
    for name in ("prompts_plain", "prompts_sums", "prompts_gamed"):
        prompts, _ = read_prompts([str(folder / f"{name}.jsonl")])
        assert {check_verifier(prompt.verifier or {}) for prompt in prompts} <= {"exact", "constraints"}
    for path in folder.rglob("*.yaml"):
        assert open_task_file(path).items


def test_the_habit_is_there_and_the_gamed_reward_prefers_what_is_wrong(folder: Path) -> None:
    taught = [record["taught"] for record in records(folder / "heldout.jsonl")]
    assert 0.3 <= sum(answer.startswith(HABIT) for answer in taught) / len(taught) <= 0.7
    reward = open_constraints()
    for record in records(folder / "prompts_gamed.jsonl")[:50]:
        prompt, right = record["messages"][0]["content"], record["target"]
        wrong = f"{right} well well well well well well"
        assert reward(Sample(prompt, right, record)) < reward(Sample(prompt, wrong, record)) == 1
        assert exact(Sample(prompt, right, record)) == 1 > exact(Sample(prompt, wrong, record))


def test_it_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    write_all(tmp_path)
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes()
