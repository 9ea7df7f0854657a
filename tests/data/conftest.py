"""Small texts and a prepared folder shared by the data tests."""

from pathlib import Path

import pytest
from rich.console import Console
from texts import config_of

from data.prepare import prepare
from recipes.schema.data import DataConfig


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "verse").mkdir()
    for index in range(12):
        lines = [f"line {index} {n}: the quick brown fox über {n * index} naïve dogs\n" for n in range(20)]
        (tmp_path / "verse" / f"{index:02d}.txt").write_text("".join(lines))
    records = [f'{{"content": "def f{n}(x):\\n    return x + {n}\\n", "id": {n}}}\n' * 3 for n in range(60)]
    (tmp_path / "code.jsonl").write_text("".join(records))
    return tmp_path


@pytest.fixture
def prepared(texts: Path) -> DataConfig:
    config = config_of(texts)
    prepare(config, console=Console(quiet=True))
    return config
