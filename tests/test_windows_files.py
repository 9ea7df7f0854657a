"""Text files from Windows editors: a byte order mark and CRLF line ends change nothing that is read."""

import base64
import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import SYSTEM, tokenizer, tokenizer_file
from recipes_composed import composed

from data.chat.prompts import read_prompts as read_prompts_to_learn
from data.chat.template import open_template
from data.sources.records import Part, read_part
from data.tokenizer import load_tokenizer
from launch.plan.published.rows import PUBLISHED, read_rows
from recipes.schema.data import SourceConfig, TokenizerConfig
from recipes.schema.foreign import read_json
from train.evaluate.tasks.files import open_task_file
from train.inference.text import read_prompts

LINES = "".join(json.dumps(record) + "\n" for record in ({"text": "one\nline"}, {"text": "two"}))
TABLE = 'text,"more"\n"one, and",2\nthree,4\n'
QUOTED = '"text",more\n"one, and",2\nthree,4\n'
PROMPTS = "".join(
    json.dumps({"prompt": text, "verifier": {"kind": "number"}, "target": "3"}) + "\n" for text in ("1 + 2?", "0 + 3?")
)
TASK = "kind: cloze\ndata: mine.jsonl\nprompt: |\n  {text}\n  and\ntarget: ' more'\n"
RANKS = "".join(f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256))


def records(path: Path) -> list[Any]:
    kind = path.suffix.removeprefix(".")
    source = SourceConfig(path=str(path))
    size = path.stat().st_size
    return [
        (record.text, record.problem)
        for record in read_part("data.sources.mine", source, Part(str(path), kind, size=size, file_size=size))
    ]


def recipe(path: Path) -> dict[str, Any]:
    return composed("-cn", path.stem, "--config-dir", str(path.parent)) | {"folder": None}


def encoded(path: Path) -> list[int]:
    config = (
        TokenizerConfig()
        if path.suffix == ".json"
        else TokenizerConfig(pattern="gpt2", special_tokens={"<|endoftext|>": 256})
    )
    return load_tokenizer(path, config).encode("Once upon a time <|im_end|>")


def task(path: Path) -> list[Any]:
    (path.parent / "mine.jsonl").write_text(LINES)
    return [(item.prompt, item.targets) for item in open_task_file(path).items]


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "records": ("a.jsonl", LINES, records),
    "a table": ("a.csv", TABLE, records),
    "a table that begins with a quote": ("a.csv", QUOTED, records),
    "a recipe": ("mine.yaml", "defaults:\n  - smoke\n  - _self_\nrun:\n  name: mine\n  steps: 7\n", recipe),
    "a task": ("task.yaml", TASK, task),
    "prompts": ("a.txt", "Once\nUpon a time \n\n", read_prompts),
    "prompts as records": ("a.jsonl", '"Once"\n{"prompt": "a\\r\\nb"}\n', read_prompts),
    "prompts to learn": ("a.jsonl", PROMPTS, lambda path: read_prompts_to_learn([str(path)])),
    "a tokenizer": ("tokenizer.json", tokenizer_file().read_text(), encoded),
    "a tokenizer of ranks": ("my.tiktoken", RANKS, encoded),
    "a chat template": (
        "chat.jinja",
        "{% for message in messages %}\n{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}\n",
        lambda path: open_template(str(path), tokenizer()).render(SYSTEM),
    ),
    "JSON of a model": ("config.json", '{\n  "hidden_size": 8\n}\n', read_json),
    "published rows": ("rows.csv", PUBLISHED.read_text(), read_rows),
}  # fmt: skip


@pytest.mark.parametrize("what", READERS)
def test_marks_and_line_ends_of_windows_change_nothing(what: str, tmp_path: Path) -> None:
    """Each reader, with CRLF, with a mark, with both."""
    name, text, read = READERS[what]
    plain = text.encode()
    found = []
    for number, content in enumerate(
        (plain, plain.replace(b"\n", b"\r\n"), codecs.BOM_UTF8 + plain, codecs.BOM_UTF8 + plain.replace(b"\n", b"\r\n"))
    ):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        found.append(json.dumps(read(path), default=str).replace(str(path.parent), "FOLDER"))
    assert len(set(found)) == 1, found
