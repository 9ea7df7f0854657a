"""Task files: the items made of records, and one clear error for each fault, with file and line."""

import codecs
from pathlib import Path
from typing import Any

import pytest
from task_files import CAPITALS, task_in

from recipes.schema.errors import DataError
from train.evaluate.last_number import last_number
from train.evaluate.tasks.files import open_task_file
from train.evaluate.tasks.task import Item, Task
from train.evaluate.tasks.verify import JUDGES


def opened(folder: Path, records: list[Any], **fields: Any) -> Task:
    return open_task_file(task_in(folder, records, **fields))


def test_choices_prompts_and_examples(tmp_path: Path) -> None:
    """Braces in a field are ordinary text; the solved example comes first and is not an item; blank lines are skipped."""
    fields = {
        "kind": "multiple_choice",
        "prompt": "{{Q}} {country}:",
        "choices": "cities",
        "answer": "right",
        "shots": 1,
    }
    task = opened(tmp_path, [CAPITALS[0], "", *CAPITALS[1:]], **fields)
    before = "{Q} France: Paris\n\n"
    assert task.name == "mine" and [item.place.rpartition(":")[2] for item in task.items] == ["3", "4"]
    assert task.items[0].prompt == before + "{Q} Italy:" and task.items[0].targets == (" Milan", " Rome")
    assert task.items[0].answer == 1 and task.items[1].prompt == before + "{Q} {Spain}:"
    assert len(open_task_file(tmp_path / "mine.yaml", items=1).items) == 1


def test_equal_questions_have_equal_hashes_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    record = {"prompt": "a", "target": "b"}
    one, other = (opened(folder, [record], kind="cloze") for folder in (tmp_path, tmp_path / "other"))
    assert one.hash == other.hash
    assert opened(tmp_path, [{**record, "target": "c"}], kind="cloze").hash != one.hash
    assert opened(tmp_path, [record], kind="cloze", end_of_document=True).hash != one.hash
    assert (
        opened(tmp_path, [record], kind="generate", max_new_tokens=3).hash
        != opened(tmp_path, [record], kind="generate", max_new_tokens=4).hash
    )


FAULTS: list[tuple[list[Any], dict[str, Any], str]] = [
    ([{"prompt": "a"}], {"kind": "cloze"}, r"data\.jsonl:1: the record has no field 'target', which `target` needs\. It has"),
    ([{"prompt": "a", "tagret": "b"}], {"kind": "cloze"}, r":1: .*no field 'target'.* Did you mean tagret\?"),
    ([{"prompt": "a", "target": " "}], {"kind": "cloze"}, r":1: the target is empty"),
    ([{"prompt": ["a"], "target": "b"}], {"kind": "cloze"}, r":1: prompt=\['a'\] is not a text or a number"),
    ([{"prompt": "a", "target": True}], {"kind": "cloze"}, r":1: target=True is not a text"),
    (["{", ], {"kind": "cloze"}, r"data\.jsonl:1: this line is not JSON"),
    (["", "[1]"], {"kind": "cloze"}, r"data\.jsonl:2: \[1\] is not a record"),
    ([], {"kind": "cloze"}, r"data\.jsonl has no record to ask\. Add records, one JSON object a line\."),
    (['[{"prompt": "a",', '"target": "b"}]'], {"kind": "cloze"}, r"\.jsonl:1: this line is not JSON.*Write one record a line"),
    (['{"prompt": NaN, "target": "b"}'], {"kind": "cloze"}, r":1: prompt=nan is not a text or a number"),
    (['{"prompt": "\\ud800", "target": "b"}'], {"kind": "cloze"}, r":1: prompt='\\ud800' is not a text"),
    (['{"prompt": "a", "prompt": "b", "target": "b"}'], {"kind": "cloze"}, r":1: .*'prompt' is written twice"),
    ([{"prompt": "a", "target": "b"}], {"kind": "generate", "stop": ["x", ""]}, r"mine\.yaml: stop=.* has an empty text"),
    ([{"prompt": "a", "target": "b"}], {"kind": "cloze", "shots": 1}, r"has no record to ask \(1 of them serve as examples"),
    ([{"prompt": "", "target": "b"}], {"kind": "rolling"}, r":1: the text is empty"),
    ([{"prompt": "a", "choices": [], "answer": 0}], {"kind": "multiple_choice"}, r":1: choices=\[\] is not a list of two"),
    ([{"prompt": "a", "choices": ["x"], "answer": 0}], {"kind": "multiple_choice"}, r"is not a list of two or more"),
    ([{"prompt": "a", "choices": ["x", ""], "answer": 0}], {"kind": "multiple_choice"}, r":1: choice 1 of choices is ''"),
    ([{"prompt": "a", "choices": ["x", "x"], "answer": 0}], {"kind": "multiple_choice"}, r"has the same choice twice"),
    ([{"prompt": "a", "choices": ["x", "y"], "answer": 2}], {"kind": "multiple_choice"}, r"answer=2 is not the number .* 0 to 1"),
    ([{"prompt": "a", "choices": ["x", "y"], "answer": -1}], {"kind": "multiple_choice"}, r"answer=-1 is not the number"),
    ([{"prompt": "a", "choices": ["x", "y"], "answer": "z"}], {"kind": "multiple_choice"}, r"answer='z' is neither a choice"),
    ([{"prompt": "a", "choices": ["x", "y"], "answer": True}], {"kind": "multiple_choice"}, r"answer=True is neither"),
    ([{"prompt": "a", "choices": ["x", "y"]}], {"kind": "multiple_choice"}, r"no field 'answer', which `answer` needs"),
    ([{"prompt": "a", "target": "b"}], {"kind": "cloze", "prompt": "{prompt} {"}, r"has a single '\{'\. Write \{\{"),
    ([{"prompt": "a", "target": "b"}], {"kind": "generate", "verifier": "number"}, r":1: the target 'b' has no number"),
    ([{"id": 3, "prompt": "a", "target": "b"}, {"id": "3", "prompt": "c", "target": "d"}], {"kind": "cloze"},
     r"data\.jsonl:2: id='3' is that of .*data\.jsonl:1 too\. Remove one"),
    ([{"task_id": "x", "prompt": "a", "target": "b"}] * 2, {"kind": "cloze"}, r":2: task_id='x' is that of .*:1 too"),
    ([{"prompt": "a", "target": "b"}], {"kind": "clozed"}, r"mine\.yaml: kind='clozed' is not a choice\. Did you mean cloze\?"),
    ([{"prompt": "a", "target": "b"}], {}, r"mine\.yaml: kind is missing: cloze: the probability"),
    ([{"prompt": "a", "target": "b"}], {"kind": "cloze", "promt": "x"}, r"promt is not a field\. Did you mean prompt"),
    ([{"prompt": "a", "target": "b"}], {"kind": "cloze", "data": "gone.jsonl"}, r"gone\.jsonl, the data of .*mine\.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("records", "fields", "message"), FAULTS, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_every_fault_is_named_with_its_place(
    tmp_path: Path, records: list[Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, records, **fields)


def test_task_files_that_are_missing_or_not_yaml(tmp_path: Path) -> None:
    task_in(tmp_path, [])
    with pytest.raises(DataError, match=r"there is no task file .*mein\.yaml\. Did you mean mine\.yaml\?"):
        open_task_file(tmp_path / "mein.yaml")
    for text, was in {"": "is empty", "- a": "is a list", "hello": "is a str"}.items():
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(DataError, match=rf"mine\.yaml {was}, not a task\. Write its fields, such as `kind: cloze`"):
            open_task_file(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("kind: [")
    with pytest.raises(DataError, match=r"mine\.yaml cannot be read: it is not YAML .* \(line 1"):
        open_task_file(tmp_path / "mine.yaml")


def test_files_of_other_editors_are_read(tmp_path: Path) -> None:
    """A mark at the begin, lines that end with carriage returns, no end of the last line, records that come twice."""
    path = task_in(tmp_path, [], kind="cloze")
    record = b'{"prompt": "a", "target": " b"}'
    (tmp_path / "data.jsonl").write_bytes(codecs.BOM_UTF8 + record + b"\r\n" + record)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [(item.prompt, item.targets) for item in open_task_file(path).items] == [("a", (" b",))] * 2


@pytest.mark.parametrize(
    ("verifier", "target", "answer", "score"),
    [
        ("exact", " Paris", "Paris\n", 1), ("exact", "Paris", "Paris!", 0),
        ("contains", "Paris", "It is Paris.", 1), ("contains", "Paris", "It is Rome.", 0),
        ("number", "so 1,200", "first 3, then 1200.0", 1), ("number", "12", "121", 0), ("number", "-3", "x = -3.", 1),
        ("number", "5", "none", 0),
        ("all", "ABC\nDEF", "abc, xyz", 0.5), ("all", "ABC\nDEF", "they are def abc", 1),
    ],
)  # fmt: skip
def test_judges(verifier: str, target: str, answer: str, score: float) -> None:
    assert JUDGES[verifier](Item("", "", (target,)), answer) == score


def test_the_last_number_of_a_text() -> None:
    assert last_number("1 and -2.5e3.") == -2500 and last_number("a-b") is None and last_number("7,000 or 8") == 8
