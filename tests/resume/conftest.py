"""The smoke recipe made tiny, with the test's own data, as command-line arguments."""

import json
from pathlib import Path

import pytest
from processes import RUN, SHAPE
from rich.console import Console
from texts import VOCAB, config_of

from data.prepare import prepare
from recipes.schema.data import DataConfig


@pytest.fixture
def words(prepared: DataConfig, tmp_path: Path) -> list[str]:
    """Overrides that make the smoke recipe tiny, over this test's own data."""
    sources = [f"~data.sources.{name}" for name in ("shakespeare", "python")]
    for name, source in prepared.sources.items():
        fields = {"path": source.path, "weight": source.weight, "text_field": source.text_field}
        sources += [f"+data.sources.{name}.{key}={value}" for key, value in fields.items()]
    data = [
        f"data.folder={prepared.folder}", f"data.tokenizer.vocab_size={VOCAB}", f"data.row_tokens={prepared.row_tokens}",
        f"data.heldout_fraction={prepared.heldout_fraction}",
    ]  # fmt: skip
    return ["-cn", "smoke", *SHAPE, *RUN, *sources, *data, f"run.folder={tmp_path}"]


@pytest.fixture
def prepared(texts: Path) -> DataConfig:
    config = config_of(texts)
    prepare(config, console=Console(quiet=True))
    return config


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "verse").mkdir(parents=True)
    for index in range(12):
        lines = [f"line {index} {n}: the quick brown fox über {n * index} naïve dogs\n" for n in range(20)]
        (folder / "verse" / f"{index:02d}.txt").write_text("".join(lines))
    records = [json.dumps({"content": f"def f{n}(x):\n    return x + {n}\n"}) + "\n" for n in range(180)]
    (folder / "code.jsonl").write_text("".join(records))
    return folder
